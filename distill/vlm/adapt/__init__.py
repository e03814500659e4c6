"""Domain adaptation (Mini-InternVL, arXiv 2410.16261, section 3.3): other tasks' annotations as conversations.

Classification, detection, referring, region questions and multi-view driving become records of one format, so that a
small VLM learns a domain like any other data. The stage's `weight` of each source mixes general data in.
"""

from distill.vlm.adapt.convert import TASKS, AdaptTask, adapt_records, convert_record
from distill.vlm.adapt.write import write_records

__all__ = ["TASKS", "AdaptTask", "adapt_records", "convert_record", "write_records"]
