"""transformers' common tests of an image processor, on ours."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.image_processing_auto import AutoImageProcessor

from conformance.upstream import Conformance, common_tests
from tokenpacker.hf import TokenPackerImageProcessor

image_processing = common_tests("test_image_processing_common")
image_processing.AutoImageProcessor = AutoImageProcessor  # transformers 5.16 hides it where torchvision is missing


class TokenPackerImageProcessingTester:
    """One tile of 18 pixels for each image; their tests read the attributes."""

    batch_size = 7
    num_channels = 3
    image_processing_classes = {"pil": TokenPackerImageProcessor}  # noqa: RUF012 - by backend

    def __init__(self, parent: Any):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {"image_mode": "pad", "tile_size": [18, 18], "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, int, int]:
        return self.num_channels, 18, 18

    def prepare_image_inputs(self, **kwargs: Any) -> list[Any]:
        settings = {"batch_size": self.batch_size, "num_channels": self.num_channels} | kwargs
        return image_processing.prepare_image_inputs(min_resolution=30, max_resolution=400, **settings)


class TokenPackerImageProcessingTest(image_processing.ImageProcessingTestMixin, Conformance):
    image_processor_tester_class = TokenPackerImageProcessingTester
    test_cast_dtype = True

    def setUp(self) -> None:
        self.image_processor_tester = TokenPackerImageProcessingTester(self)

    @property
    def image_processing_classes(self) -> dict[str, type]:
        return self.image_processor_tester.image_processing_classes

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()
