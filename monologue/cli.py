"""The command line: ``monologue play | eval | verify | view | export | import | rewrite | serve | train | tasks``.

Exit codes: 0 all went well; 1 some episodes failed, or a check did not hold; 2 bad use (one sentence says what was expected);
130 stopped by Ctrl-C, with every finished episode kept. Errors that are nobody's fault but ours show their traceback.
Heavy libraries load inside the command that needs them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from monologue import commands, exports, rewriting, serving, stages, viewing
from monologue.asked import GRAPHS
from monologue.tasks.corpora import CORPORA, SPLITS
from monologue.version import __version__

STAGES = ("starter", "imitate", "reinforce", "latent")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="monologue", description="Reasoning graphs that can be trained.")
    top.add_argument("--version", action="version", version=f"monologue {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    _play(verbs.add_parser("play", help="play problems and record every step"))
    _eval(verbs.add_parser("eval", help="accuracy of graphs on held-out problems, with standard errors and controls"))
    _verify(verbs.add_parser("verify", help="check that a run is complete and consistent"))
    _view(verbs.add_parser("view", help="look at a run: a page in the browser, one offline file, or the terminal"))
    _serve(verbs.add_parser("serve", help="start SGLang servers for the policies"))
    _export(verbs.add_parser("export", help="hand a run to another tool: OTLP, Phoenix, inspect, TRL, verl, verifiers"))
    _import(verbs.add_parser("import", help="read a run back from an OTLP-JSON export"))
    _rewrite(verbs.add_parser("rewrite", help="human rationales as dialogues to imitate, by a hosted chat model"))
    _train(verbs.add_parser("train", help="train a policy from a recipe"))
    _tasks(verbs.add_parser("tasks", help="list tasks, or show some problems of one"))
    return top


def _seats(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--questioner",
        default="starter",
        metavar="MODEL",
        help="'starter', 'oracle', a folder or name of a Hugging Face LLM, or chat:PROVIDER:MODEL",
    )
    command.add_argument(
        "--answerer",
        default="starter",
        metavar="MODEL",
        help="'starter', 'oracle', a folder or name of a Hugging Face VLM, or chat:PROVIDER:MODEL",
    )
    command.add_argument(
        "--thinker",
        default="starter",
        metavar="MODEL",
        help="graph latent: 'starter', 'oracle', or a folder that 'monologue train latent' wrote",
    )
    command.add_argument(
        "--backend",
        default="transformers",
        choices=commands.BACKENDS,
        help="engine that runs the policies; scripted: no model, plays the oracle",
    )
    command.add_argument("--temperature", type=float, help="0 (default) is greedy")
    command.add_argument("--top-p", type=float, help="default: 1")
    command.add_argument("--max-tokens", type=int, help="sampled tokens per turn at most (default: 64)")
    command.add_argument("--max-turns", type=int, help="actions of the concluding seat at most (default: 8)")
    command.add_argument("--concurrency", type=int, help="episodes at once (default: 64)")
    command.add_argument("--processes", type=int, default=1, help="processes that share the episodes, each with its own engines")
    command.add_argument("--seed", type=int, default=0)


def _folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--folder", type=Path, metavar="DIR", help=f"where the files of {', '.join(sorted(commands.WITH_FOLDER))} lie")


def _play(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", default="shapes", choices=commands.NAMES)
    _folder(command)
    command.add_argument("--split", help="default: test")
    command.add_argument(
        "--graph", default="monologue", metavar="GRAPH", help="e.g. monologue, monologue:looks=2, latent, direct, caption, blind"
    )
    command.add_argument("--n", type=int, help="problems (default: 20)")
    command.add_argument("--families", metavar="NAMES", help="families of shapes or hops, separated by commas (default: the usual ones)")
    command.add_argument("--samples", type=int, default=1, help="episodes per problem")
    command.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: a new one under runs/)")
    command.add_argument("--control", choices=commands.CONTROLS)
    command.add_argument("--live", action="store_true", help="show every turn as it comes, one episode after another")
    command.add_argument("--capture", choices=("all", "shape"), default="all", help="shape: no text, token ids or pictures on disk")
    command.add_argument("--otlp", metavar="URL", help="send each finished episode to this collector, e.g. http://127.0.0.1:6006")
    exports.add_collector(command)
    command.add_argument("--deadline", type=float, metavar="SECONDS", help="an episode that takes longer fails (default: none)")
    command.add_argument("--retries", type=int, default=0, metavar="N", help="play an episode again whose engine was lost or late")
    command.add_argument("--no-resume", action="store_true", help="refuse a run folder that exists")
    command.add_argument("--image", type=Path, metavar="FILE", help="your own picture")
    command.add_argument("--question", metavar="TEXT", help="your own question about --image")
    command.add_argument("--choices", nargs="+", metavar="ANSWER", help="answers to choose from")
    _seats(command)
    command.set_defaults(run=commands.play)


def _eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", nargs="?", choices=("graphs", "latent"), default="graphs", help="latent: are a thinker's thoughts used?")
    command.add_argument(
        "--controls",
        nargs="?",
        const="all",
        metavar="NAMES",
        help="latent: answer again with the latent steps interfered with (default: all controls), probe them, count needed patches",
    )
    command.add_argument("--task", default="shapes", choices=commands.NAMES)
    _folder(command)
    command.add_argument("--split", help="default: test")
    command.add_argument("--graph", default=GRAPHS, metavar="GRAPHS", help="names separated by commas")
    command.add_argument("--n", type=int, help="problems (default: 1000)")
    command.add_argument("--families", metavar="NAMES", help="question families separated by commas (default: the usual ones)")
    command.add_argument("--json", type=Path, metavar="FILE")
    command.add_argument("--out", type=Path, metavar="DIR", help="keep the runs here (default: thrown away)")
    command.add_argument("--control", choices=commands.CONTROLS)
    _seats(command)
    command.set_defaults(run=commands.evaluate)


def _verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--json", type=Path, metavar="FILE")
    command.add_argument("--no-replay", dest="replay", action="store_false", help="do not recompute log-probs: no model is loaded")
    command.add_argument("--calls", type=int, metavar="N", help="replay N calls drawn from the whole run (default: all)")
    command.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of log-probs in nats (default: 1e-4)")
    command.add_argument(
        "--weights", action="append", default=[], metavar="POLICY=DIR", help="where the weights of a policy, or POLICY@VERSION, lie now"
    )
    command.set_defaults(run=commands.verify)


def _view(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--episode", metavar="ID", help="episode id or the beginning of one: replay it in the terminal")
    command.add_argument("--svg", type=Path, metavar="FILE", help="with --episode: also write what is shown as a picture")
    command.add_argument("--list", action="store_true", help="list the episodes in the terminal")
    command.add_argument("--html", type=Path, metavar="FILE", help="write the page as one file that needs no network, and stop")
    command.add_argument("--port", type=_port, default=0, help="of the served page (default: a free one)")
    command.add_argument("--no-browser", action="store_true", help="print the page's address only")
    command.add_argument(
        "--tokenizer",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="tokenizer.json to name the tokens with, where the models are elsewhere",
    )
    command.set_defaults(run=viewing.view)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _serve(command: argparse.ArgumentParser) -> None:
    command.add_argument("--questioner", default="starter", metavar="MODEL", help="'starter', a folder or Hub name, or 'none'")
    command.add_argument("--answerer", default="starter", metavar="MODEL", help="'starter', a folder or Hub name, or 'none'")
    command.add_argument("--thinker", default="none", metavar="MODEL", help="takes latent steps: 'starter' or a folder (default: none)")
    command.add_argument("--tiny", action="store_true", help="the shipped policies on this machine's CPU (tests_real/install_sglang.sh)")
    command.add_argument("--replicas", type=int, default=1, metavar="N", help="servers of each role, which share its episodes")
    command.add_argument("--gpus", metavar="IDS", help="dealt out to the servers in turn, e.g. 0,1 (default: all on the first)")
    command.add_argument("--lora-rank", type=int, default=0, metavar="N", help="take LoRA adapters up to this rank (default: none)")
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda")
    command.add_argument("--dtype", default="", help="default: bfloat16 on a GPU, float32 on a CPU")
    command.add_argument("--python", metavar="FILE", help="the Python in which sglang is installed (default: this one)")
    command.add_argument("--port", type=int, metavar="N", help="of the first server; the others have the next ones (default: free ones)")
    command.add_argument(
        "--flag", action="append", default=[], metavar="TEXT", help="a further flag of sglang.launch_server, e.g. --flag=--tp=2"
    )
    command.add_argument("--logs", type=Path, default=Path("runs/serve"), metavar="DIR")
    command.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for a server to answer")
    command.set_defaults(run=serving.serve)


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument(
        "--to", required=True, choices=(*exports.TARGETS, *exports.TRAINERS), help="otlp and phoenix send, the others write"
    )
    command.add_argument("--out", type=Path, metavar="PATH", help="file to be written; for trl, verl and verifiers a folder")
    command.add_argument("--endpoint", metavar="URL", help="server to be sent to, e.g. http://127.0.0.1:6006")
    exports.add_collector(command)
    command.add_argument(
        "--role", action="append", metavar="ROLE", help="trainers: this seat only; may be given again (default: all trained)"
    )
    command.add_argument("--keep", choices=("all", "solved"), help="trainers: which episodes (default: solved; for verifiers all)")
    shapes = "trl: exact ids (default; text only), or messages and pictures that TRL tokenises anew"
    command.add_argument("--shape", choices=("ids", "messages"), help=shapes)
    command.set_defaults(run=exports.export)


def _import(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE", help="what 'monologue export --to otlp-json' wrote")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to be made")
    command.set_defaults(run=exports.import_run)


def _rewrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", required=True, choices=sorted(CORPORA))
    command.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the corpus's files lie")
    command.add_argument("--split", default="train", choices=SPLITS, help="default: train")
    command.add_argument("--n", type=int, help="problems (default: all)")
    command.add_argument("--model", required=True, metavar="MODEL", help="chat:PROVIDER:MODEL, by LangChain's names")
    command.add_argument("--concurrency", type=int, default=8, metavar="N", help="rationales asked for at once (default: 8)")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of dialogues to be made, or to go on with")
    command.set_defaults(run=rewriting.rewrite)


def _train(command: argparse.ArgumentParser) -> None:
    told = "starter: the shipped policies, from nothing; imitate: what a role said in a run; reinforce: on outcome; "
    told += "latent: from saying its reasoning to thinking it"
    command.add_argument("stage", choices=STAGES, metavar="STAGE", help=told)
    command.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a recipe of ours by name (answerer, questioner, direct, imitate, reinforce, immo, latent ...) or a TOML file",
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a top-level key of the recipe")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: runs/RECIPE")
    command.add_argument("--start", type=Path, metavar="DIR", help="checkpoint to start from: perception for 'direct'")
    command.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages of the recipe only, e.g. after --start")
    command.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    command.add_argument("--retokenize", action="store_true", help="imitate: put the run's words into the ids of who is trained, first")
    command.add_argument("--resume", action="store_true", help="all but starter: go on where a training in --out was ended")
    command.set_defaults(run=stages.train)


def _tasks(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", choices=commands.NAMES)
    _folder(command)
    command.add_argument("--split", default="test")
    command.add_argument("--n", type=int, default=3)
    command.set_defaults(run=commands.tasks)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except commands.user_errors() as error:
        print(f"monologue: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"monologue: stopped; {commands.kept(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
