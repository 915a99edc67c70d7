"""Side by side with the strongest 4-bit quantisers that install on a CPU: each in its own environment, on the same tokens.

For each rival: a virtual environment with pinned requirements (made once; every package is pinned, so pip resolves nothing and
none can drag in another torch), its own quantisation of the base on exactly the given calibration windows, then the score of
what it wrote, in that environment and through its own loader, on exactly the evaluation windows (see score.py). Head and
embedding are kept by all. Its seconds and memory are its own, on the threads given; a rival that fails is written down as such.
AutoRound costs minutes, the others less than one. A finished quantisation lies under WORK and is not made again, only scored.

    python evaluation/rivals/run.py --base MODEL_DIR --calibration FILE --evaluation FILE --work DIR --out RESULTS.json

FILE: safetensors with int64 `windows` [S, L], as windows.py writes them.
The pins name a CPU build of torch (`+cpu`): where pip does not find one by
itself, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS tell it where. Needs nothing but Python: the environments bring the rest.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import venv
from math import prod
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RIVALS = {"autoround": "auto-round", "gptqmodel": "gptqmodel", "llmcompressor": "llmcompressor"}  # name -> package
ASK_VERSIONS = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def environment(folder: Path, requirements: Path) -> Path:
    """The interpreter of the virtual environment in `folder`, made or brought up to `requirements` where need be."""
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        if not python.exists():
            venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", requirements], check=True)
        stamp.write_text(requirements.read_text())
    return python


def run(command: list[object], log: Path, threads: int) -> None:
    """Run a command on `threads` threads, offline, with all it prints in `log`; its last line is the error if it fails."""
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_CPU_WORKERS": "2",  # fewer, its default on two cores, and it dies at start
    }
    with log.open("a") as out:
        words, variables = [str(part) for part in command], os.environ | settings
        done = subprocess.run(words, stdout=out, stderr=out, env=variables, cwd=log.parent, check=False)
    if done.returncode:
        said = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        raise RuntimeError(said[-1][:300] if said else f"exit code {done.returncode}, no output")


def compare(rival: str, given: argparse.Namespace) -> dict[str, Any]:
    """Quantise the base with one rival, unless that is done already, and score the result."""
    python = environment(given.work / "venvs" / rival, HERE / f"requirements-{rival}.txt")
    job = f"{given.base.name}-{windows(given.calibration)['sha256'][:8]}-g{given.group}-{given.dtype}"
    place = given.work / "out" / job / rival
    place.mkdir(parents=True, exist_ok=True)
    facts, scores, log = place / "facts.json", place / "score.json", place / "log.txt"
    if not facts.exists():
        shutil.rmtree(place / "model", ignore_errors=True)  # what a killed run left
        script = [python, HERE / f"rival_{rival}.py", "--base", given.base, "--calibration", given.calibration]
        script += ["--out", place / "model", "--facts", facts, "--group", given.group, "--dtype", given.dtype]
        run(script, log, given.threads)
    made: dict[str, Any] = json.loads(facts.read_text())
    model = place / "model" / made.pop("folder")
    judge = [python, HERE / "score.py", "--base", given.base, "--model", model]
    run([*judge, "--evaluation", given.evaluation, "--json", scores], log, given.threads)
    versions = subprocess.check_output([python, "-c", ASK_VERSIONS, RIVALS[rival], "torch", "transformers"], text=True)
    scored: dict[str, Any] = json.loads(scores.read_text())
    return {"versions": json.loads(versions)} | made | scored


def windows(file: Path) -> dict[str, Any]:
    """Name, shape and token hash of a window file, read from its bytes: an 8-byte header length, a JSON header, the numbers."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + size])["windows"]
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "I64" or end - begin != 8 * prod(entry["shape"]):
        raise SystemExit(f"{file.name}: windows are {entry['dtype']} {entry['shape']}; give int64 [S, L]")
    tokens = content[8 + size + begin : 8 + size + end]
    return {"file": file.name, "shape": entry["shape"], "sha256": hashlib.sha256(tokens).hexdigest()}


def hardware() -> str:
    """The machine in words: processor, number of cores, memory."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = f", {int(meminfo.read_text().split()[1]) / 2**20:.0f} GiB" if meminfo.exists() else ""
    return f"{processor}, {os.cpu_count()} cores{memory}, no GPU used"


def table(results: dict[str, Any]) -> str:
    """The results as a few aligned lines."""
    lines = [f"{'rival':15}{'bits':>7}{'KL nats':>10}{'top-1':>8}{'perplexity':>12}{'MB':>7}{'CPU s':>8}"]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"{name:15}failed: {r['error']}")
        else:
            numbers = f"{r['bits_per_weight']:7.3f}{r['kl_nats_mean']:10.5f}{r['top1_agreement']:8.4f}{r['perplexity']:12.3f}"
            lines.append(f"{name:15}{numbers}{r['size_bytes'] / 1e6:7.2f}{r['cpu_seconds']:8.0f}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "calibration", "evaluation", "work", "out"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--group", type=int, default=128, help="weights that share a scale")
    parser.add_argument("--dtype", default="auto", help="what rivals load the base in: auto (as on disk), float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    results: dict[str, Any] = {}
    for rival in given.rivals:
        print(f"{rival} ...", flush=True)
        try:
            results[rival] = compare(rival, given)
        except (RuntimeError, subprocess.CalledProcessError) as failure:
            results[rival] = {"error": str(failure).replace(str(given.work), "WORK")}
    named = {"--base": given.base.name, "--calibration": given.calibration.name, "--evaluation": given.evaluation.name}
    options = {"--rivals": " ".join(given.rivals), "--group": given.group, "--dtype": given.dtype, "--threads": given.threads}
    report = {
        "command": "python evaluation/rivals/run.py " + " ".join(f"{key} {value}" for key, value in (named | options).items()),
        "hardware": hardware(),
        "threads": given.threads,
        "base": given.base.name,
        "calibration": windows(given.calibration),
        "evaluation": windows(given.evaluation),
        "rivals": results,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
