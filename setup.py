"""What pyproject.toml cannot say: the wheel has copies of the shipped recipes, which lie in `recipes/` of
a checkout."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INSIDE = Path("llmcompress", "recipe", "shipped_recipes")


class BuildWithRecipes(build_py):
    """Copies `recipes/*.yaml` into the package; an editable installation reads them from the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that are built, those copies among them."""
        copies = [] if self.editable_mode else [*self._recipes().values()]
        return [*super().get_outputs(include_bytecode), *copies]

    def _recipes(self) -> dict[str, str]:
        """Each recipe file, and where its copy goes."""
        files = sorted((ROOT / "recipes").glob("*.yaml"))
        if not files:
            raise FileNotFoundError(f"{ROOT / 'recipes'} holds no recipes; build from a checkout or an sdist")
        return {str(file): str(Path(self.build_lib) / INSIDE / file.name) for file in files}


setup(cmdclass={"build_py": BuildWithRecipes})
