import copy

from tokenpacker.evaluate import TASKS, measure, measure_model, tasks


def test_every_task_is_measured_at_every_scale_factor(tiny_model_dir):
    rows = measure_model(tiny_model_dir, limit=4, progress=False)
    assert [(row["scale_factor"], row["task"], row["tokens_per_tile"]) for row in rows] == [
        (2, "easy-vqa", 16),
        (2, "fine-print", 16),
        (3, "easy-vqa", 9),
        (3, "fine-print", 9),
        (4, "easy-vqa", 4),
        (4, "fine-print", 4),
    ]
    assert all(row["questions"] == 4 and 0 <= row["correct"] <= 4 for row in rows)
    assert rows[0]["image_tokens"] > rows[4]["image_tokens"]


def test_a_projector_without_scale_factors_is_measured_once(make_tiny_model, tiny_tokenizer, tmp_path):
    from tokenpacker.hf import TokenPackerProcessor

    model = make_tiny_model(projector_config={"name": "mlp"})
    model.save_pretrained(tmp_path)
    TokenPackerProcessor.from_config(model.config, tiny_tokenizer).save_pretrained(tmp_path)
    rows = measure_model(tmp_path, limit=2, progress=False)
    assert [(row["projector"], row["scale_factor"], row["tokens_per_tile"]) for row in rows] == [("mlp", None, 64)] * 2


def test_a_model_that_takes_regions_is_asked_about_them_too(make_tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    from tokenpacker.hf import TokenPackerProcessor, add_regions

    model = make_tiny_model()
    processor = TokenPackerProcessor.from_config(model.config, copy.deepcopy(tiny_tokenizer))
    add_regions(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = {name: TASKS[name] for name in ("fine-print", "regions", "regions-shuffled")}
    monkeypatch.setattr(measure, "TASKS", asked)
    monkeypatch.setattr(tasks, "NUM_FINE_PRINT_IMAGES", 1)
    monkeypatch.setattr(tasks, "NUM_REGION_IMAGES", 2)
    monkeypatch.setattr(measure, "SCALE_FACTORS", (2,))
    rows = measure_model(tmp_path, limit=3, progress=False)
    assert [(row["task"], row["questions"]) for row in rows] == [(name, 3) for name in asked]
