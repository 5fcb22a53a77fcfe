"""Data: sources, splits, shuffling, augmentation, batches and the input pipeline."""

from ev3_distill.data.augment import Augmentation
from ev3_distill.data.batches import Resident, Window, held_out, resident, sampler
from ev3_distill.data.deal import splits_of, units_of
from ev3_distill.data.near_copies import count_near_copies, duplicate_groups
from ev3_distill.data.pipeline import ResidentPipeline, Views, WindowPipeline
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.data.splits import SPLITS, count_shared, split_rows
from ev3_distill.data.statistics import input_statistics

__all__ = [
    "SPLITS",
    "Augmentation",
    "Dataset",
    "Resident",
    "ResidentPipeline",
    "Views",
    "Window",
    "WindowPipeline",
    "count_near_copies",
    "count_shared",
    "duplicate_groups",
    "held_out",
    "input_statistics",
    "load_data",
    "resident",
    "sampler",
    "split_rows",
    "splits_of",
    "units_of",
]
