"""Reference pages from docstrings.

    .. api:: mmkit
       load_data
       split

documents names of a module: first a table of their summaries, then each in full. `:mm:`name`` on
any page links to a name of the package, shown as users write it: `mm.name`.
"""

import dataclasses
import importlib
import inspect
from operator import attrgetter

from sphinx.domains.python import PyObject, PyXRefRole
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from .fields import fields_of


class Api(SphinxDirective):
    """A table of the names, then the entry of each."""

    required_arguments = 1
    has_content = True

    def run(self):
        """Nodes of the table and of the entries."""
        names = [line.strip() for line in self.content if line.strip()]
        module = importlib.import_module(self.arguments[0])
        found = {f"{self.arguments[0]}.{name}": attrgetter(name)(module) for name in names}
        summed_up = [f"   ~{name}" for name, value in found.items() if callable(value)]
        text = [".. autosummary::", "   :nosignatures:", "", *summed_up, ""] if summed_up else []
        for name, value in found.items():
            text += [*_entry(name, value), ""]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=False)


def _entry(name: str, value) -> list[str]:
    """The directive that documents a value."""
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:"]
    if callable(value):
        return [f".. autofunction:: {name}"]
    module, _, last = name.rpartition(".")
    head = [f".. py:data:: {last}", f"   :module: {module}"]
    if isinstance(value, dict):
        return [*head, "", f"   Names: {', '.join(f'``{k}``' for k in value)}."]
    return [*head, f"   :value: {value!r}"]


# -- links -----------------------------------------------------------------------------------


class MmRole(PyXRefRole):
    """A link to a public name, shown as `mm.name`."""

    def process_link(self, env, refnode, has_explicit_title, title, target):
        """Complete the target to `mmkit.name`."""
        refnode["refdomain"] = "py"
        shown = title if has_explicit_title else f"mm.{target}"
        return shown, f"mmkit.{target.removesuffix('()')}"


def link_by_last_name(app, env, node, contnode):
    """Resolve `mmkit.masking.core.Masking`, or `Masking` in a docstring, where it is documented.

    A public object has one entry, under its shortest name; other modules have it, too.
    """
    if node.get("refdomain") != "py":
        return None
    target, kind = node["reftarget"].removeprefix("mm."), node["reftype"]
    if kind != "name" and not target.startswith("mmkit."):
        return None
    objects = env.domains.python_domain.objects
    ends = [full for full in objects if f".{full}".endswith(f".{target.removeprefix('mmkit.')}")]
    last = target.rpartition(".")[2]
    if not ends and kind != "name":
        ends = [full for full in objects if full.endswith(f".{last}")]
    ends = [full for full in ends if not objects[full].aliased]
    if kind == "name" and "." not in target:  # of a class, Sphinx knows its own methods
        ends = [full for full in ends if objects[full].objtype not in ("method", "property")]
    if len(ends) != 1:
        return None
    entry = objects[ends[0]]
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, ends[0]
    )


# -- docstrings ------------------------------------------------------------------------------


def document_fields(app, what, name, value, options, lines):
    """Add the fields of a dataclass, with their comments, to its docstring."""
    if what != "class" or not dataclasses.is_dataclass(value):
        return
    if len(found := fields_of(value)) > 30:
        return  # `TrainingConfig` has a page of its own
    lines += ["", "Attributes:"]
    for field in found:
        comment = field.comment + (f" (default: {field.default})" if field.default else "")
        lines.append(f"    {field.name} ({field.annotation}): {comment}")
    lines.append("")


def without_fields(app, what, name, value, options, signature, returns):
    """Leave out the signature of a dataclass: it only repeats the fields."""
    if what == "class" and dataclasses.is_dataclass(value):
        return "", returns
    return None


def setup(app):
    """Register directive, roles and hooks."""
    app.add_directive("api", Api)
    app.add_role("mm", MmRole())
    app.add_role_to_domain("py", "name", PyXRefRole())
    app.connect("missing-reference", link_by_last_name)
    app.connect("autodoc-process-docstring", document_fields, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", without_fields)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Fields"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
