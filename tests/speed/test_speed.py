"""Split times: every setting is measured on every image."""

import pytest

from tokenpacker.scenes import Question, Sample
from tokenpacker.speed.question import Setting, measure_speed


def test_each_setting_gets_its_tokens_and_both_times(tiny_model, tiny_processor, image_of):
    question = Question("what is it?", "yes", "what")
    samples = [Sample(name=str(i), image=image_of(32, 32, seed=i), questions=(question,), caption="") for i in range(5)]
    settings = [Setting(label=f"s = {s}", model=tiny_model, processor=tiny_processor, scale_factor=s) for s in (2, 4)]
    speeds = measure_speed(settings, samples, max_new_tokens=2)
    assert [speed.label for speed in speeds] == ["s = 2", "s = 4"]
    assert [speed.image_tokens for speed in speeds] == [17, 5]  # 8 x 8 patches in windows of s x s, and a separator
    assert all(speed.num_questions == 2 for speed in speeds)  # three warm up
    assert all(speed.vision_ms > 0 and speed.language_ms > 0 for speed in speeds)
    assert all(speed.total_ms == speed.vision_ms + speed.language_ms for speed in speeds)


def test_too_few_samples_are_refused(tiny_model, tiny_processor):
    setting = Setting(label="s = 2", model=tiny_model, processor=tiny_processor)
    with pytest.raises(ValueError, match="0 samples are too few"):
        measure_speed([setting], [])
