"""Runs of a trainer that die where a test says: a process that has imported everything forks one child per rank.

`python tests/survival.py` is that process. It reads jobs, one JSON object a line, answers with the children's process
ids, and tells of their ends. A child runs the trainer's file as `__main__`, as a launcher would have started it.
`Runner.launch` starts what `accelerate launch` would, for the other tests of several processes.

Between any two file operations inside --output_dir, before each backward pass, packing of a row, token of a rollout,
exchange, write of tensors and fsync, a child passes a *point*, which has a name such as `rename out/checkpoint-2`. A
fault `{"at": regular expression, "n": 3, "do": "SIGKILL"}` comes true at the third point whose name matches; `do` is
a signal, `torn` (the tensors' file is cut in half, then SIGKILL), `limit` (no file grows beyond 5,000 bytes), `fail`,
`wait`, or the name of an errno, which then stays ("full disk") if `stays` is true.
"""

import errno
import json
import os
import re
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


ZERO3 = {  # what accelerate launch sets for accelerate_configs/zero3.yaml
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": 3,
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ in the child


def arm(output_dir: str, faults: list[dict], trace: str | None):
    """Make this process pass points, and the faults come true at theirs."""
    import multivideo as mv

    import safetensors.torch
    import torch

    output_dir, counts, busy = os.path.realpath(output_dir), [0] * len(faults), []
    log = open(trace, "a", buffering=1) if trace else None  # noqa: SIM115

    def point(kind, path=None):
        if busy or threading.current_thread() is not threading.main_thread():
            return
        busy.append(True)  # what is done here is no point
        try:
            name = kind if path is None else f"{kind} {os.path.relpath(path, os.path.dirname(output_dir))}"
            if log:
                log.write(name + "\n")
            for i, fault in enumerate(faults):
                if re.search(fault["at"], name):
                    counts[i] += 1
                    if counts[i] == fault["n"] or (counts[i] > fault["n"] and fault.get("stays")):
                        act(fault["do"], path)
        finally:
            busy.clear()

    def act(what, path):
        if what == "torn":
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            what = "SIGKILL"
        if what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
        elif what == "limit":  # real, for writers that are not Python
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        elif what == "fail":
            raise RuntimeError("failed on purpose")
        elif what == "wait":
            time.sleep(3600)
        else:
            raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)), str(path))

    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = args[0]
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and isinstance(args[0], (str, Path)):
            path = args[1] if event == "os.rename" else args[0]
        else:
            return
        path = os.path.realpath(path)
        if path.startswith(output_dir + os.sep):
            point(event.removeprefix("os."), path)

    def before(owner, name, kind, path=None, after=False):
        inner = getattr(owner, name)

        def passing(*args, **kwargs):
            point(kind, path(args) if path else None)
            result = inner(*args, **kwargs)
            if after:
                point(f"{kind}-end", path(args) if path else None)
            return result

        setattr(owner, name, passing)

    sys.addaudithook(hook)
    for name in ("pack", "exchange", "stop_asked"):
        before(mv, name, name)
    before(mv.Engine, "backward", "backward")
    before(torch, "searchsorted", "sample")  # train_grpo.py draws with it, a token of each completion at a time
    before(mv, "_fsync", "fsync", lambda args: os.path.realpath(args[0]))
    before(safetensors.torch, "serialize_file", "serialize", lambda args: os.path.realpath(args[1]), after=True)
    before(torch, "save", "shard", lambda args: os.path.realpath(args[1]), after=True)  # DeepSpeed's own writing


def child(job):
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["env"])
    sys.argv = [job["script"], *job["argv"]]
    if job["faults"] or job["trace"]:
        arm(job["argv"][job["argv"].index("--output_dir") + 1], job["faults"], job["trace"])
    runpy.run_path(str(ROOT / job["script"]), run_name="__main__")


def serve():
    """Fork a child per job, tell of each child's end: the loop of the process that has imported everything."""
    sys.path[:0] = [str(ROOT)]
    import multivideo  # noqa: F401

    import torch
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    import transformers.models.qwen2_5_vl.processing_qwen2_5_vl
    import transformers.models.qwen2_vl.video_processing_qwen2_vl  # noqa: F401

    for name in sys.argv[1:]:
        __import__(name)
    torch.set_num_threads(1)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    answers, waiting = os.fdopen(os.dup(1), "w", buffering=1), b""
    os.dup2(2, 1)
    answers.write("ready\n")
    while True:
        ready, _, _ = select.select([0, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                answers.write(f"end {pid} {os.waitstatus_to_exitcode(status)}\n")
        if 0 in ready:
            received = os.read(0, 1 << 16)
            if not received:
                os._exit(0)
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    try:
                        child(job)
                    except SystemExit as end:
                        sys.stdout.flush()
                        sys.stderr.flush()
                        leave(end.code or 0)
                    except BaseException:
                        sys.excepthook(*sys.exc_info())
                        leave(1)
                    leave(0)
                answers.write(f"start {pid}\n")


def leave(code):
    """End as an interpreter does that was started for this: threads joined, atexit run."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------------- in the test


class Runner:
    """Starts trainers through one forking process; `limit` is how long a run may take before it counts as hung."""

    def __init__(self, env: dict, limit: float = 240, preload: tuple = ()):
        self.limit, self.started, self.ends, self.said = limit, [], {}, threading.Condition()
        # the environment's ninja: another version would compile DeepSpeed's extensions again, and the next one again
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": path}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *preload], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **self.fixed, **env},
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            word, *numbers = line.split()
            with self.said:
                if word == "start":
                    self.started.append(int(numbers[0]))
                elif word == "end":
                    self.ends[int(numbers[0])] = int(numbers[1])
                self.said.notify_all()

    def start(self, script, flags, output_dir, world=1, faults=None, env=None, trace=None):
        """Start `world` ranks; `faults`: rank → list of faults. Returns a Run."""
        argv = [*map(str, flags), "--output_dir", str(output_dir)]
        return self.fork(script, argv, output_dir, world, faults, env, trace)

    def launch(self, *words, log, check=True):
        """Run what `accelerate launch WORDS` starts, several processes, forked here: without 16 s of imports.

        accelerate itself makes their environment of its config file; of torchrun, SIGTERM for all when one has failed
        is left. `log` is what the names of the log files begin with.
        """
        script, argv, world, env = read_launch(words)
        run = self.fork(script, argv, log, world, env={**env, **self.fixed}).wait(kill_others=30)
        assert not check or not any(run.codes), "\n".join(run.said)[-8000:]
        return run

    def fork(self, script, argv, log, world, faults=None, env=None, trace=None):
        """Start `world` ranks of any script; `log` begins the names of their log files. Returns a Run."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids, logs = [], []
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        for rank in range(world):
            logs.append(f"{log}.{time.time_ns()}.{rank}.log")
            Path(logs[-1]).touch()
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 or env else {}  # fmt: skip
            job = {
                "script": str(script), "argv": list(map(str, argv)), "log": logs[-1],
                "env": {key: str(value) for key, value in {**(env or {}), **ranks}.items()},
                "faults": (faults or {}).get(rank, []), "trace": trace and f"{trace}.{rank}",
            }  # fmt: skip
            with self.said:
                self.process.stdin.write(json.dumps(job) + "\n")
                self.process.stdin.flush()
                assert self.said.wait_for(lambda: self.started or self.process.poll() is not None, self.limit)
                pids.append(self.started.pop())
        return Run(self, pids, logs)

    def run(self, *args, **kwargs):
        """Start, and wait for the end of all ranks."""
        return self.start(*args, **kwargs).wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


def read_launch(words) -> tuple[str, list[str], int, dict]:
    """(script, its arguments, number of processes, their environment): what `accelerate launch WORDS` hands on to
    torchrun."""
    from unittest import mock

    from accelerate.commands.launch import launch_command, launch_command_parser

    handed = []

    def noted(args):
        handed.append((args.training_script, args.training_script_args, int(args.nproc_per_node), dict(os.environ)))

    with mock.patch("torch.distributed.run.run", noted):
        launch_command(launch_command_parser().parse_args([str(word) for word in words]))
    return handed[0]


def at(points: list[str], i: int, do: str) -> dict:
    """The fault that comes true at number i of the points that a run passes; OUT stands for its --output_dir."""
    pattern = "^" + re.escape(points[i]).replace("OUT", "[^/]+") + "$"
    return {"at": pattern, "n": points[: i + 1].count(points[i]), "do": do}


class Run:
    """One attempt: `codes` and `said` (what was printed) by rank, `seconds` between the first end and the last."""

    def __init__(self, runner, pids, logs):
        self.runner, self.pids, self.logs, self.codes = runner, pids, logs, None

    @property
    def said(self):
        return [Path(log).read_text(errors="replace").replace("\r", "\n") for log in self.logs]

    def signal(self, number, rank=None):
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, number)

    def until(self, condition, limit=120):
        """Wait for a file to appear or a condition to hold."""
        end = time.monotonic() + limit
        while not (condition.exists() if isinstance(condition, Path) else condition()):
            assert time.monotonic() < end, f"waited {limit} s in vain\n" + "\n".join(self.said)[-3000:]
            assert not all(pid in self.runner.ends for pid in self.pids), "\n".join(self.said)[-3000:]
            time.sleep(0.02)
        return self

    def until_running(self):
        """Wait for the loop to begin."""
        return self.until(lambda: all("train:" in text for text in self.said[:1]))

    def wait(self, limit=None, kill_others=None):
        """Wait for all ranks; a hang kills them and raises TimeoutError. `kill_others`: as a launcher would, SIGTERM
        when one has ended badly and SIGKILL so many seconds later."""
        ends, first = self.runner.ends, None
        end = time.monotonic() + (limit or self.runner.limit)
        with self.runner.said:
            while not all(pid in ends for pid in self.pids):
                self.runner.said.wait(0.2)
                bad = [pid for pid in self.pids if ends.get(pid)]
                if bad and first is None:
                    first = time.monotonic()
                    if kill_others:
                        self._all(signal.SIGTERM)
                if bad and kill_others and time.monotonic() > first + kill_others:
                    self._all(signal.SIGKILL)
                if time.monotonic() > end:
                    self._all(signal.SIGKILL)
                    raise TimeoutError("hung:\n" + "\n".join(self.said)[-4000:])
            self.codes = [ends.pop(pid) for pid in self.pids]
        self.seconds = 0 if first is None else time.monotonic() - first
        return self

    def _all(self, number):
        for pid in self.pids:
            if pid not in self.runner.ends:
                os.kill(pid, number)


VOLATILE = {"step_seconds", "data_wait_seconds", "max_memory_gb", "rollout_seconds", "reward_seconds",
            "rollout_tokens_per_second", "update_tokens_per_second"}  # fmt: skip


def metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl but for time and memory."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]


def differences(folder, reference) -> list[str]:
    """What differs, bit for bit, between two finished runs: weights, metrics with record checksums, lines, files."""
    import torch
    from safetensors.torch import load_file

    folder, reference = Path(folder), Path(reference)
    found = []
    ours, theirs = metrics(folder), metrics(reference)
    if ours != theirs:
        found += [f"metrics: {a} is not {b}" for a, b in zip(ours, theirs) if a != b][:1]
        found += [f"metrics: {len(ours)} rows, not {len(theirs)}"] * (len(ours) != len(theirs))
    names = {path.name for path in reference.iterdir() if path.is_file()}
    if (other := {path.name for path in folder.iterdir() if path.is_file()}) != names:
        found.append(f"files: {sorted(other ^ names)}")
    for name in ("predictions.jsonl", "completions.jsonl"):
        if (reference / name).is_file() and (folder / name).read_text() != (reference / name).read_text():
            found.append(f"{name}: other lines")
    for path in reference.glob("*.safetensors"):
        weights, expected = load_file(folder / path.name), load_file(path)
        wrong = [name for name in expected if name not in weights or not torch.equal(weights[name], expected[name])]
        found += [f"{path.name}: {len(wrong)} tensors, first {name}" for name in wrong[:1]]
    return found


if __name__ == "__main__":
    serve()
