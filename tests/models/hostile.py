"""Files that would run code if they were read carelessly."""

import pickle

from tests.models.folders import edit

KERNEL = {
    name: "kernels-community/evil" for name in ("attn_implementation", "_attn_implementation")
}


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def make_hostile(folder, trace):
    """Use all ways in which a transformers folder can ask for its own code, or for a kernel."""
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    of_model = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            auto_map = of_model | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
            edit(folder, lambda v, m=auto_map: v.update(auto_map=m, custom_code="evil.py"), file)
    for name in ("pytorch_model.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Hostile(trace)))
