"""The audio tokenizer against its equations in numpy float64, and against the published names and sizes.

The reference below shares no code with the package: loops over frames, taps and heads, weights by their
published names. Legend: T frames, D width.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf
from torch.utils._python_dispatch import TorchDispatchMode

from sateen.checkpoint.audio import load_audio_tokenizer, resolve_audio_tokenizer
from sateen.errors import CheckpointError, ConfigError, ShapeError
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig, audio_tokenizer_preset
from sateen.models.mimo_audio.tokenizer_presets import AUDIO_TOKENIZER_PRESETS
from sateen.models.mimo_audio.transformer import attend

TINY = AUDIO_TOKENIZER_PRESETS["mimo-audio-tokenizer-mini"] | {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_skip_layer_id": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "vocoder_dim": 12,
    "vocoder_intermediate_dim": 20,
    "vocoder_num_layers": 2,
    "vocoder_attention_heads": 2,
    "vocoder_attn_window_size": [3, 1],
    "nfft": 64,
    "window_size": 64,
    "hop_length": 16,
    "n_mels": 10,
    "sampling_rate": 1600,
    "num_quantizers": 3,
    "codebook_size": [8, 8, 4],
}
CONFIG = AudioTokenizerConfig.from_hf(TINY)


def made(seed: int = 0) -> AudioTokenizer:
    """A tiny tokenizer whose biases and norms are random too, so that a missing one shows."""
    tokenizer = AudioTokenizer(CONFIG).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return tokenizer.eval()


def clip(num_samples: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


# The reference.


class Reference:
    def __init__(self, tokenizer: AudioTokenizer):
        self.w = {k: v.detach().double().numpy() for k, v in tokenizer.state_dict().items()}
        self.c = tokenizer.config

    def layer_norm(self, x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x, name, has_bias=True):
        assert (f"{name}.bias" in self.w) == has_bias
        return x @ self.w[f"{name}.weight"].T + (self.w[f"{name}.bias"] if has_bias else 0)

    def conv(self, x, name, stride, padding):
        """Cross-correlation over time of x [T, in]."""
        weight = self.w[f"{name}.weight"]  # out, in, taps
        taps = weight.shape[2]
        x = np.pad(x, ((padding, padding), (0, 0)))
        steps = (len(x) - taps) // stride + 1
        out = np.zeros((steps, weight.shape[0]))
        for t in range(steps):
            for k in range(taps):
                out[t] += weight[:, :, k] @ x[t * stride + k]
        return out + self.w.get(f"{name}.bias", 0)

    def up_sample(self, x, name, stride):
        """The transposed convolution, the norm over everything, then the cut."""
        weight = self.w[f"{name}.conv.weight"]  # in, out, taps
        taps = weight.shape[2]
        out = np.zeros(((len(x) - 1) * stride + taps, weight.shape[1]))
        for t in range(len(x)):
            for k in range(taps):
                out[t * stride + k] += x[t] @ weight[:, :, k]
        out += self.w[f"{name}.conv.bias"]
        out = (out - out.mean()) / np.sqrt(out.var() + 1e-5)
        out = out * self.w[f"{name}.norm.weight"] + self.w[f"{name}.norm.bias"]
        return out[: stride * len(x)]

    def attention(self, x, name, heads, sees):
        q, v = self.linear(x, f"{name}.q_proj"), self.linear(x, f"{name}.v_proj")
        k = self.linear(x, f"{name}.k_proj", has_bias=False)
        T, D = x.shape
        H = D // heads
        out = np.zeros((T, D))
        for n in range(heads):
            part = slice(n * H, (n + 1) * H)
            qs = [rotate(q[t, part], t, self.c.rope_theta) for t in range(T)]
            ks = [rotate(k[t, part], t, self.c.rope_theta) for t in range(T)]
            for t in range(T):
                scores = np.array([qs[t] @ ks[s] / math.sqrt(H) if sees(t, s) else -np.inf for s in range(T)])
                p = np.exp(scores - scores.max())
                out[t, part] = p / p.sum() @ v[:, part]
        return self.linear(out, f"{name}.out_proj")

    def layer(self, x, name, heads, sees):
        normed = self.layer_norm(x, f"{name}.self_attn_layer_norm")
        x = x + self.attention(normed, f"{name}.self_attn", heads, sees)
        y = gelu(self.linear(self.layer_norm(x, f"{name}.final_layer_norm"), f"{name}.fc1"))
        return x + self.linear(y, f"{name}.fc2")

    def encode(self, mel, behind=None):
        """Hidden states [L, D]; `behind` zero frames follow in a batch, as in the published code."""
        T, halved = len(mel), -(-len(mel) // 2)
        x = gelu(self.conv(np.pad(mel, ((0, behind or 0), (0, 0))), "encoder.conv1", 1, 1))
        x = gelu(self.conv(x if behind else x[:T], "encoder.conv2", 2, 1))[:halved]
        for i in range(self.c.encoder_layers):
            x = self.layer(x, f"encoder.layers.{i}", self.c.encoder_attention_heads, lambda t, s: True)
            if i == self.c.encoder_skip_layer_id - 1:
                skipped = x
        x = self.layer_norm(x + skipped, "encoder.layer_norm")
        if len(x) % 2:
            x = np.concatenate([x, x[-1:] if behind and -(-(T + behind) // 2) > halved else 0 * x[-1:]])
        x = gelu(self.conv(x, "encoder.down_sample_layer.0", 2, 0))
        return self.layer_norm(x, "encoder.down_sample_norm")

    def quantize(self, hidden):
        codes, total = [], np.zeros_like(hidden)
        for r in range(self.c.num_quantizers):
            entries = self.w[f"encoder.quantizer.vq.layers.{r}._codebook.embed"]
            codes.append(((hidden - total)[:, None] - entries).__pow__(2).sum(-1).argmin(-1))
            total = total + entries[codes[-1]]
        return np.stack(codes)

    def vectors(self, codes):
        name = "encoder.quantizer.vq.layers.{}._codebook.embed"
        return sum(self.w[name.format(r)][row] for r, row in enumerate(codes))

    def decode(self, codes):
        x = self.up_sample(self.vectors(codes), "decoder.dconv1", 2)
        for i in range(self.c.decoder_layers):
            x = self.layer(x, f"decoder.layers.{i}", self.c.decoder_attention_heads, lambda t, s: s <= t)
        return self.vocode(self.up_sample(self.layer_norm(x, "decoder.layer_norm"), "decoder.dconv2", 2))

    def vocode(self, mel):
        left, right = self.c.vocoder_attn_window_size
        x = self.linear(mel, "decoder.vocoder.embeddings", has_bias=False)
        for i in range(self.c.vocoder_num_layers):
            x = self.layer(
                x,
                f"decoder.vocoder.layers.{i}",
                self.c.vocoder_attention_heads,
                lambda t, s: t - left <= s <= t + right,
            )
        x = self.linear(self.layer_norm(x, "decoder.vocoder.layer_norm"), "decoder.vocoder.head.out")
        half = self.c.nfft // 2 + 1
        magnitude, phase = np.minimum(np.exp(x[:, :half]), 100), x[:, half:]
        n_fft, hop = self.c.nfft, self.c.hop_length
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
        wave, weight = np.zeros((2, (len(x) - 1) * hop + n_fft))
        for t in range(len(x)):
            frame = np.fft.irfft(magnitude[t] * np.exp(1j * phase[t]), n_fft)
            wave[t * hop : t * hop + n_fft] += window * frame
            weight[t * hop : t * hop + n_fft] += window**2
        cut = (n_fft - hop) // 2
        return (wave[cut:-cut]) / weight[cut:-cut]


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def rotate(x, position, theta):
    """Pairs (j, j + H/2) turned by position * theta^(-2j/H)."""
    H = len(x)
    out = x.copy()
    for j in range(H // 2):
        angle = position * theta ** (-2 * j / H)
        a, b = x[j], x[j + H // 2]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + H // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def distance(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """Largest difference relative to the largest value."""
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(ours.detach().double().numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("num_samples", [33, 160, 16 * 13, 16 * 14, 16 * 15, 16 * 16 + 5])
def test_encoding_equals_the_equations(num_samples):
    tokenizer, wave = made(), clip(num_samples)
    reference = Reference(tokenizer)
    hidden = reference.encode(tokenizer.mel(wave).double().numpy())
    assert distance(tokenizer.hidden(wave), hidden) < 1e-5
    codes = reference.quantize(hidden)
    assert np.array_equal(tokenizer.encode(wave).numpy(), codes)
    assert np.array_equal(tokenizer.encode(wave, num_quantizers=2).numpy(), codes[:2])
    assert codes.shape[1] == math.ceil(math.ceil((num_samples // 16 + 1) / 2) / 2)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("num_quantizers", [1, 2, 3])
def test_decoding_equals_the_equations(num_tokens, num_quantizers):
    tokenizer = made(1)
    generator = torch.Generator().manual_seed(5)
    codes = torch.stack([torch.randint(c, (num_tokens,), generator=generator) for c in CONFIG.codebook_size])
    codes = codes[:num_quantizers]
    wave = tokenizer.decode(codes)
    assert wave.shape == (num_tokens * CONFIG.samples_per_token,)
    assert distance(wave, Reference(tokenizer).decode(codes.numpy())) < 2e-5


def test_magnitudes_are_cut_off_at_100():
    tokenizer = made(2)
    with torch.no_grad():
        tokenizer.decoder.vocoder.head.out.bias += 6
    codes = torch.zeros(1, 3, dtype=torch.int64)
    assert distance(tokenizer.decode(codes), Reference(tokenizer).decode(codes.numpy())) < 2e-5


def test_reconstruct_is_encode_then_decode_and_reaches_every_parameter():
    tokenizer = made(3)
    waves = torch.stack([clip(500, 0), clip(500, 1)])
    found = tokenizer.reconstruct(waves)
    for b in range(2):
        codes = tokenizer.encode(waves[b])
        assert torch.equal(found.codes_BRT[b], codes)
        assert torch.allclose(found.wave_BN[b], tokenizer.decode(codes)[:500], atol=1e-5)
        assert torch.allclose(found.quantized_BTD[b], tokenizer.encoder.quantizer.decode(codes), atol=1e-6)
        assert torch.allclose(found.hidden_BTD[b], tokenizer.hidden(waves[b]), atol=1e-5)
    (found.wave_BN.square().mean() + found.commitment).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert tokenizer.reconstruct(waves, num_quantizers=1).codes_BRT.shape == (2, 1, found.codes_BRT.shape[2])


# Batches.


def padded(mels):
    return torch.nn.utils.rnn.pad_sequence(mels, batch_first=True), torch.tensor([len(m) for m in mels])


@pytest.mark.parametrize("lengths", [(9, 4, 1), (12, 11, 10), (7, 7), (8, 5, 3, 2)])
def test_a_batch_encodes_each_clip_as_if_alone(lengths):
    tokenizer = made(4)
    mels = [torch.randn(n, CONFIG.n_mels, generator=torch.Generator().manual_seed(n)) - 3 for n in lengths]
    together = tokenizer.encoder(*padded(mels))
    for b, mel in enumerate(mels):
        alone = tokenizer.encoder(mel[None])[0]
        assert torch.allclose(together[b, : len(alone)], alone, atol=2e-6)


@pytest.mark.parametrize("lengths", [(13, 12), (13, 11), (13, 10), (13, 9), (12, 9), (16, 3)])
def test_reference_batching_equals_the_published_treatment_of_padding(lengths):
    tokenizer = made(4)
    mels = [torch.randn(n, CONFIG.n_mels, generator=torch.Generator().manual_seed(n)) - 3 for n in lengths]
    together = tokenizer.encoder(*padded(mels), reference_batching=True)
    reference = Reference(tokenizer)
    for b, mel in enumerate(mels):
        alone = tokenizer.encoder(mel[None])[0]
        theirs = reference.encode(mel.double().numpy(), behind=max(lengths) - len(mel))
        assert distance(together[b, : len(theirs)], theirs) < 1e-5
        is_longest = len(mel) == max(lengths)
        # An odd number of frames reads conv1's padding; an odd half of it a repeated frame.
        differs = not is_longest and (len(mel) % 2 == 1 or math.ceil(len(mel) / 2) % 2 == 1)
        assert torch.allclose(together[b, : len(alone)], alone, atol=1e-5) != differs


def test_long_clips_are_pieces_of_60_seconds():
    tokenizer = made(5)
    wave = clip(61 * 1600 + 37)
    mel = tokenizer.mel(wave)
    assert CONFIG.segment_frames == 6000
    assert CONFIG.segment_tokens == 1500
    pieces = [tokenizer.encoder(mel[None, :6000])[0], tokenizer.encoder(mel[None, 6000:])[0]]
    assert torch.equal(tokenizer.hidden(wave), torch.cat(pieces))
    codes = tokenizer.encode(wave)
    assert codes.shape == (3, 1500 + math.ceil(math.ceil((len(mel) - 6000) / 2) / 2))
    halves = [tokenizer.decode(codes[:, :1500]), tokenizer.decode(codes[:, 1500:])]
    assert torch.equal(tokenizer.decode(codes), torch.cat(halves))
    batched = tokenizer.hidden(wave, reference_batching=True)
    assert torch.allclose(batched[:1500], pieces[0], atol=1e-4)
    assert (batched[1500:] - pieces[1]).abs().max() > 1e-3


# What sees what.


@pytest.mark.parametrize("T", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("window", [(40, 10), (3, 0), (0, 2), (-1, 2), (5, -1), (-1, 0), (-1, -1)])
def test_windowed_attention_equals_a_dense_mask(T, window):
    generator = torch.Generator().manual_seed(T)
    lengths = torch.tensor([T, max(1, T - 3)])
    keys = torch.arange(T) < lengths[:, None]
    q, k, v = (torch.randn(2, T, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    t = torch.arange(T)
    left, right = (side if side >= 0 else T for side in window)
    sees = (t[None, :] >= t[:, None] - left) & (t[None, :] <= t[:, None] + right)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(8)
    scores = scores.masked_fill(~(sees & keys[:, None, None, :]), -math.inf)
    # Padded queries see nothing in the dense form; their outputs are not compared.
    expected = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1).nan_to_num(), v)[keys]
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).nansum(), leaves)
    ours = attend(q, k, v, window, keys)[keys]
    assert torch.allclose(ours, expected, atol=1e-12)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), leaves), gradients, strict=True):
        assert torch.allclose(a, b.nan_to_num(), atol=1e-11)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_memory_of_a_window_grows_with_the_frames_not_their_square():
    sizes = []
    for T in (1024, 4096):
        q = torch.randn(1, T, 2, 8)
        with LargestTensor() as largest, torch.no_grad():
            attend(q, q, q, (40, 10))
        sizes.append(largest.numel)
    assert sizes[1] <= 4.1 * sizes[0]


def test_later_tokens_change_earlier_frames_through_the_norms_only():
    tokenizer = made(6)
    decoder = tokenizer.decoder
    vectors = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    changed = vectors.clone()
    changed[:, 8:] += 1
    frozen = decoder.statistics(vectors)
    with torch.no_grad():
        assert torch.allclose(decoder.coarse_mel(vectors, frozen), decoder.coarse_mel(vectors), atol=1e-5)
        before, after = decoder.coarse_mel(vectors, frozen), decoder.coarse_mel(changed, frozen)
        assert torch.equal(before[:, :32], after[:, :32])
        assert (before[:, 32] - after[:, 32]).abs().max() > 1e-3
        free = decoder.coarse_mel(vectors) - decoder.coarse_mel(changed)
    assert free[:, :32].abs().max() > 1e-3


def test_a_sample_depends_on_exactly_the_vocoders_windows():
    vocoder = made(7).decoder.vocoder
    T, hop, overlap = 40, CONFIG.hop_length, (CONFIG.nfft - CONFIG.hop_length) // 2
    mel = torch.randn(1, T, CONFIG.n_mels, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wave = vocoder(mel)[0]
    for n in (20 * hop, 20 * hop + hop - 1):
        (gradient,) = torch.autograd.grad(wave[n], mel, retain_graph=True)
        touched = gradient[0].abs().amax(1).nonzero()[:, 0].tolist()
        # Transforms that cover the sample, by their position in the untrimmed sum; the first sample of a
        # Hann window is zero. Two layers see 3 frames back and 1 ahead each.
        cover = [t for t in range(T) if t * hop < n + overlap < t * hop + CONFIG.nfft]
        assert touched == list(range(cover[0] - 6, cover[-1] + 2 + 1))
    assert touched[-1] - 20 == vocoder.look_ahead_frames
    with torch.device("meta"):
        published = AudioTokenizer(audio_tokenizer_preset("mimo-audio-tokenizer"))
    assert published.decoder.vocoder.look_ahead_frames == 16 * 10 + 2


# Names, sizes, files.


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors at the published size."""

    def linear(name, out, into, bias=True):
        return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def layers(name, count, width, ffn):
        out = {}
        for i in range(count):
            one = f"{name}.layers.{i}"
            for part in ("q_proj", "v_proj", "out_proj"):
                out |= linear(f"{one}.self_attn.{part}", width, width)
            out |= linear(f"{one}.self_attn.k_proj", width, width, bias=False)
            out |= norm(f"{one}.self_attn_layer_norm", width) | norm(f"{one}.final_layer_norm", width)
            out |= linear(f"{one}.fc1", ffn, width) | linear(f"{one}.fc2", width, ffn)
        return out | norm(f"{name}.layer_norm", width)

    d = 1280
    shapes = {"encoder.conv1.weight": (d, 128, 3), "encoder.conv1.bias": (d,)}
    shapes |= {"encoder.conv2.weight": (d, d, 3), "encoder.conv2.bias": (d,)}
    shapes |= layers("encoder", 32, d, 5120) | layers("decoder", 32, d, 5120)
    shapes |= {"encoder.down_sample_layer.0.weight": (d, d, 2)} | norm("encoder.down_sample_norm", d)
    for r in range(20):
        one, entries = f"encoder.quantizer.vq.layers.{r}._codebook", 1024 if r < 2 else 128
        shapes |= {f"{one}.inited": (1,), f"{one}.cluster_size": (entries,)}
        shapes |= {f"{one}.embed": (entries, d), f"{one}.embed_avg": (entries, d)}
    shapes |= {"decoder.dconv1.conv.weight": (d, d, 2), "decoder.dconv1.conv.bias": (d,)}
    shapes |= {"decoder.dconv2.conv.weight": (d, 128, 3), "decoder.dconv2.conv.bias": (128,)}
    shapes |= norm("decoder.dconv1.norm", d) | norm("decoder.dconv2.norm", 128)
    shapes |= linear("decoder.vocoder.embeddings", 256, 128, bias=False)
    shapes |= layers("decoder.vocoder", 16, 256, 1024)
    shapes |= linear("decoder.vocoder.head.out", 962, 256)
    return shapes | {"decoder.vocoder.head.istft.window": (960,)}


def test_the_published_size_has_the_published_names_shapes_and_counts():
    with torch.device("meta"):
        tokenizer = AudioTokenizer(audio_tokenizer_preset("mimo-audio-tokenizer"))
    assert {name: tuple(t.shape) for name, t in tokenizer.state_dict().items()} == published_shapes()

    def millions(module):
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)

    decoder = tokenizer.decoder
    assert millions(tokenizer) == 1284.65
    assert millions(tokenizer.encoder) == 638.33
    assert millions(decoder.vocoder) == 12.91
    assert round(millions(decoder) - millions(decoder.vocoder), 2) == 633.41
    entries = sum(b.numel() for n, b in tokenizer.named_buffers() if n.endswith(".embed"))
    assert round(entries / 1e6, 2) == 5.57
    assert tokenizer.config.token_rate_hz == 25
    assert tokenizer.config.samples_per_token == 960


def test_the_mini_preset_has_the_counted_size():
    with torch.device("meta"):
        tokenizer = AudioTokenizer(audio_tokenizer_preset("mimo-audio-tokenizer-mini"))
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6, 2) == 3.44
    bits = sum(math.log2(c) for c in tokenizer.config.codebook_size)
    assert bits * tokenizer.config.token_rate_hz == 1300


@pytest.mark.parametrize("name", AUDIO_TOKENIZER_PRESETS)
def test_configs_go_in_and_out_with_unknown_keys(name):
    raw = AUDIO_TOKENIZER_PRESETS[name] | {"hybrid": {"a": [1, 2]}, "transformers_version": "4.49"}
    written = AudioTokenizerConfig.from_hf(raw).to_hf()
    assert json.loads(json.dumps(written)) == raw


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": None}, "'d_model'"),
        ({"model_type": "mimo"}, "'mimo' is not an audio tokenizer"),
        ({"ln_type": "RMSNorm"}, "ln_type 'RMSNorm' .accepted: 'LayerNorm'"),
        ({"num_quantizers": 4}, "lists 3 stages for num_quantizers 4"),
        ({"encoder_attention_heads": 3}, "encoder_attention_heads 3 for width 16"),
        ({"encoder_skip_layer_id": 4}, "encoder_skip_layer_id 4 .accepted: 1 to 3"),
        ({"nfft": 128}, "nfft 128, window_size 64"),
    ],
)
def test_configs_that_mean_something_else_are_refused(change, message):
    raw = {key: value for key, value in (TINY | change).items() if value is not None or key == "fmax"}
    with pytest.raises(ConfigError, match=message):
        AudioTokenizerConfig.from_hf(raw)


def test_save_then_load_is_bit_identical(tmp_path):
    tokenizer = made(8)
    tokenizer.update_codebooks(tokenizer.hidden(clip(8000)), torch.Generator().manual_seed(0))
    tokenizer.save(tmp_path / "one")
    again = AudioTokenizer.load(tmp_path / "one")
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config == tokenizer.config
    assert again.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(again.encode(clip(3000, 1)), tokenizer.encode(clip(3000, 1)))
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert load_audio_tokenizer(tmp_path / "one", device="meta").encoder.conv1.weight.is_meta


def test_the_fingerprint_is_of_what_codes_mean():
    tokenizer = made(8)
    print_before = tokenizer.fingerprint()
    with torch.no_grad():
        tokenizer.decoder.vocoder.head.out.weight += 1
    assert tokenizer.fingerprint() == print_before
    tokenizer.encoder.quantizer.codebooks[2].embed[0, 0] += 1
    assert tokenizer.fingerprint() != print_before


def test_tokenizers_are_found_where_models_carry_them(tmp_path):
    made().save(tmp_path / "lm" / "audio_tokenizer")
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "qwen2"}')
    assert resolve_audio_tokenizer(tmp_path / "lm") == tmp_path / "lm" / "audio_tokenizer"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "lm")
    assert AudioTokenizer.load(tmp_path / "run").config == CONFIG
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "mimo"}')
    with pytest.raises(CheckpointError, match="is 'mimo'"):
        AudioTokenizer.load(tmp_path / "text")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        AudioTokenizer.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("encoder.quantizer.vq.layers.1._codebook.embed"),
            r"1 tensors are missing: .*1._code",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), "does not account for: extra"),
        (
            lambda t: t.update({"encoder.conv1.bias": torch.zeros(3)}),
            r"shape \(3,\), the config asks for \(16,\)",
        ),
        (lambda t: t.update({"encoder.conv1.bias": torch.zeros(16, dtype=torch.int8)}), "is I8; readable"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    made().save(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        AudioTokenizer.load(tmp_path / "one")


def test_half_precision_files_and_truth_values_load_as_float32(tmp_path):
    made().save(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    stored = {n: t.bool() if n.endswith("inited") else t.bfloat16() for n, t in tensors.items()}
    save_file(stored, tmp_path / "one" / "model.safetensors")
    again = AudioTokenizer.load(tmp_path / "one").state_dict()
    assert all(t.dtype == torch.float32 for t in again.values())
    assert all(torch.equal(again[n], t.float()) for n, t in stored.items())


def test_bfloat16_parameters_leave_codebooks_and_window_as_they_are(tmp_path):
    made().save(tmp_path / "one")
    half = load_audio_tokenizer(tmp_path / "one", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}
    full = AudioTokenizer.load(tmp_path / "one")
    hidden, expected = half.hidden(clip(4000)), full.hidden(clip(4000))
    assert hidden.dtype == torch.bfloat16
    assert ((hidden - expected).square().mean() / expected.square().mean()).sqrt() < 0.03
    codes = full.encode(clip(4000))
    wave, expected = half.decode(codes), full.decode(codes)
    assert wave.dtype == torch.float32
    assert ((wave - expected).square().mean() / expected.square().mean()).sqrt() < 0.1
    assert half.fingerprint() == full.fingerprint()


def test_waves_that_are_no_clip_are_refused():
    with pytest.raises(ShapeError, match="one channel"):
        made().encode(torch.zeros(2, 1600))
    with pytest.raises(ShapeError, match="more than 32 samples"):
        made().encode(torch.zeros(0))
