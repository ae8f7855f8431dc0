"""Data sets whose right answers are known exactly: easy-VQA (public), fine print and regions (generated).

Each is a sequence of :class:`Sample`: an image with questions and a caption. A generated sample also has the
:class:`Scene` that it shows.
"""

from tokenpacker.scenes.easy_vqa import EasyVqa
from tokenpacker.scenes.fine_print import FinePrint
from tokenpacker.scenes.marked_objects import Regions
from tokenpacker.scenes.scene import Item, Question, Sample, Scene

__all__ = ["EasyVqa", "FinePrint", "Item", "Question", "Regions", "Sample", "Scene"]
