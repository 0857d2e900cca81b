"""A tiny sentence encoder in the files in which Sentence-BERT's are published."""

import string
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WIDTH = 16
POSITIONS = 48


def write_sentence_encoder(folder: Path) -> Path:
    """Random weights; the vocabulary is the alphabet, so that a letter is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=POSITIONS).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        for name, parameter in model.named_parameters():
            if "embeddings" in name and parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=1.0)  # so that what is embedded differs clearly
    model.save_pretrained(folder)
    return folder
