import torch
from torch import nn

from tokenpacker.train.optimizer import MuonAdamW, orthogonalised, split_parameters


def test_an_orthogonalised_matrix_has_singular_values_near_one():
    for shape in ((2, 16, 16), (2, 48, 16), (2, 16, 48)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.max() < 1.3  # the quintic iteration settles between 0.7 and 1.2, not at 1
        assert values.median() > 0.6


def test_matrices_of_hidden_linears_go_to_muon_and_the_rest_to_adam():
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4), "heads": nn.Linear(4, 3), "norm": nn.LayerNorm(4)})
    matrices, others = split_parameters(model)
    assert [id(parameter) for parameter in matrices] == [id(model["hidden"].weight)]
    assert len(others) == 5


def test_the_adam_part_equals_torch_adamw():
    ours, theirs = nn.Embedding(5, 3), nn.Embedding(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = MuonAdamW(ours, learning_rate=0.01, muon_learning_rate=0.1, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        for module, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            module.weight.pow(3).sum().backward()
            stepper.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=0)


def test_its_state_survives_saving_and_loading():
    model = nn.Linear(4, 4)
    optimizer = MuonAdamW(model, learning_rate=0.01, muon_learning_rate=0.1, weight_decay=0.0)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    restored = MuonAdamW(model, learning_rate=0.01, muon_learning_rate=0.1, weight_decay=0.0)
    restored.load_state_dict(optimizer.state_dict())
    assert torch.equal(restored.state[model.weight]["momentum"], optimizer.state[model.weight]["momentum"])
    assert restored.state[model.bias]["step"] == 1
