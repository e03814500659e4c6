"""Knowledge distillation for compact vision encoders.

Only the version lives here: importing `distill.losses` must not load Lightning.
"""

__version__ = "0.1.0"
