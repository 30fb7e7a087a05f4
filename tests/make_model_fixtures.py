"""Makes tests/fixtures: small checkpoints by transformers, and the logits its PyTorch models give.

Run with torch and peft installed: python tests/make_model_fixtures.py. Live tests use its functions too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
}
# Wavelengths of 6, 35, 199 and 1117 tokens: below, inside and above the band (16 to 64) it blends.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Of the four wavelengths the first is kept, the second half kept, and the others divided.
OLMO3_ROPE = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
FIXTURES = {
    "qwen2": (
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
        torch.float32,
    ),
    "qwen3": (transformers.Qwen3Config(**SIZES, head_dim=16), torch.bfloat16),
    "llama3": (
        transformers.LlamaConfig(
            **SIZES | {"eos_token_id": [1, 2]}, bos_token_id=3, rope_parameters=LLAMA3_ROPE
        ),
        torch.float32,
    ),
    "olmo3": (
        transformers.Olmo3Config(
            **SIZES | {"num_hidden_layers": 4},
            sliding_window=8,
            pad_token_id=None,
            rope_parameters=OLMO3_ROPE,
        ),
        torch.float32,
    ),
}
LENGTHS = {"olmo3": (40, 29, 5)}  # beyond its window


def random_model(config, *, seed: int, dtype=torch.float32):
    """A model whose every parameter is random and matters: norm scales and biases as well."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_((0.5 if "bias" in name else 0.25) * noise)
    return model.to(dtype)


def padded_batch(vocab: int, lengths: tuple[int, ...], *, seed: int) -> np.ndarray:
    """Right-padded random tokens, `[len(lengths), max(lengths)]`; padding is 0."""
    tokens = np.random.default_rng(seed).integers(1, vocab, (len(lengths), max(lengths)))
    return np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], tokens, 0)


def torch_logits(folder: Path, tokens: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Logits `[B, T, V]` of a folder's model, computed in float32 whatever is stored."""
    # Loaded anew: a model that went through bfloat16 has rounded its rotary frequencies as well.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    mask = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))
        )
    return output.logits.numpy()


def save_adapters(folder: Path) -> None:
    """Adapters as peft writes them, for a model of the sizes above."""
    import peft

    model = random_model(FIXTURES["qwen2"][0], seed=0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, settings).save_pretrained(folder)
    (folder / "README.md").unlink()


def main() -> None:
    save_adapters(Path(__file__).parent / "fixtures" / "qwen2_lora")
    for seed, (name, (config, dtype)) in enumerate(FIXTURES.items()):
        folder = Path(__file__).parent / "fixtures" / name
        lengths = LENGTHS.get(name, (24, 17, 5))
        random_model(config, seed=seed, dtype=dtype).save_pretrained(folder)
        tokens = padded_batch(config.vocab_size, lengths, seed=seed)
        np.savez(
            folder / "reference.npz",
            tokens=tokens.astype(np.int32),
            lengths=np.array(lengths, np.int32),
            logits=torch_logits(folder, tokens, lengths),
        )


if __name__ == "__main__":
    main()
