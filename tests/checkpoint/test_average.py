"""Averaged weights against means written here, in float64."""

import pytest
import torch

from sateen.checkpoint import hf
from sateen.checkpoint.average import average
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

RAW = preset("mimo-v2-flash-tiny") | {"vocab_size": 60, "num_nextn_predict_layers": 1}


def save(folder, seed, **changes):
    model = Decoder(ModelConfig.from_hf(RAW | changes)).init_weights(seed)
    # Norms and selection biases start equal everywhere; an average that skipped them would go unnoticed.
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("average")
    return [save(root / str(seed), seed) for seed in range(3)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_every_tensor_is_the_weighted_mean(folders, weights):
    shares = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    states = [hf.load(folder).state_dict() for folder in folders]
    found = average(folders, weights).state_dict()
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        stacked = torch.stack([state[name].double() for state in states])
        expected = torch.einsum("m,m...->...", shares / shares.sum(), stacked)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_average_of_one_model_is_that_model(folders, tmp_path):
    average([folders[1]]).save(tmp_path / "model")
    a, b = hf.load(folders[1]).state_dict(), hf.load(tmp_path / "model").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_of_bfloat16_models_is_not_rounded_to_theirs(tmp_path):
    folders = []
    for seed in range(2):
        model = Decoder(ModelConfig.from_hf(RAW)).init_weights(seed).bfloat16()
        model.save(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    a, b = (hf.load(folder).state_dict()["lm_head.weight"].double() for folder in folders)
    found = average(folders).state_dict()["lm_head.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (a + b) / 2, rtol=1e-6, atol=1e-9)


def test_what_has_no_average_is_refused(folders, tmp_path):
    other = save(tmp_path / "other", 0, vocab_size=61)
    with pytest.raises(ConfigError, match=r"other: its vocab_size is 61, that of .* 60; only models of one"):
        average([folders[0], other])
    with pytest.raises(ConfigError, match="at least one model"):
        average([])
    for weights in ([1.0], [1.0, 1.0, -1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ConfigError, match="average of 3 models has weights"):
            average(folders, weights)
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        average([folders[0], tmp_path / "nothing"])
