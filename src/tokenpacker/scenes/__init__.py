"""Data sets with exact truth: easy-VQA (public), and fine print and regions (generated).

All hand out :class:`Sample`: an image with questions, a caption and, where it was drawn by this package or can be
derived, the :class:`Scene` it shows.
"""

from tokenpacker.scenes.easy_vqa import EasyVqa
from tokenpacker.scenes.fine_print import FinePrint
from tokenpacker.scenes.marked_objects import Regions
from tokenpacker.scenes.scene import Item, Question, Sample, Scene

__all__ = ["EasyVqa", "FinePrint", "Item", "Question", "Regions", "Sample", "Scene"]
