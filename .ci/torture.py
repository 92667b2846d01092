"""Kill a training run with SIGKILL, start it again, and hold its end against that of the run left alone.

`torture.py laptop --kills 2 -- --train.epochs 1` writes results/trust/laptop.json; needs the data that the recipe needs.
"""
import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from cells import ROOT
from vit_tinyimagenet.checkpoint import load_checkpoint
from vit_tinyimagenet.record import Run, provenance, run_differences, write_json


def sitting(command, log, is_time=lambda: False):
    "One process of the run, killed when it is time; whether it ended by itself."
    with open(log, 'a', encoding='utf-8') as f:
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
        while p.poll() is None:
            if is_time():
                p.kill()
                p.wait()
                return False
            time.sleep(.5)
    if p.returncode: sys.exit(f'torture: exit code {p.returncode}; see {log}')
    return True


class Moment:
    "True from some seconds after the run's checkpoint has reached a step."
    def __init__(self, checkpoint, step, seconds):
        self.checkpoint, self.step, self.seconds = checkpoint, step, seconds
        self.seen, self.at = None, None

    def __call__(self):
        if self.at is None and self.checkpoint.exists() and self.checkpoint.stat().st_mtime_ns != self.seen:
            self.seen = self.checkpoint.stat().st_mtime_ns
            if load_checkpoint(self.checkpoint)['state']['step'] >= self.step:
                self.at = time.monotonic() + self.seconds
        return self.at is not None and time.monotonic() >= self.at


def tortured(command, log, checkpoint, kills, steps, seed):
    "Run to the end with `kills` kills on the way, drawn from `seed`; the (step, seconds after it) at which they fell."
    draw = random.Random(seed)
    moments = [(int(steps*(i + draw.random())/(kills + .5)), round(draw.uniform(0, 20), 1)) for i in range(kills)]
    for i, (step, seconds) in enumerate(moments):
        if sitting(command, log, Moment(checkpoint, step, seconds)):
            sys.exit(f'torture: ended after {i} kills; ask for fewer, or let it write checkpoints more often')
        print(f'kill {i+1} of {kills}: {seconds} s after the checkpoint of step {step} or later', flush=True)
    sitting(command, log)
    return moments


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog='options of vit_train come after --')
    p.add_argument('recipe')
    p.add_argument('--kills', type=int, default=2)
    p.add_argument('--seed', type=int, default=0, help='of the moments')
    p.add_argument('--work', type=Path, default=ROOT/'runs'/'torture', help='where both runs are kept')
    own, options = sys.argv[1:], []
    if '--' in own: own, options = own[:own.index('--')], own[own.index('--')+1:]
    args = p.parse_args(own)
    cli = [sys.executable, '-m', 'vit_tinyimagenet.cli', args.recipe, *options, '--out']
    alone, killed = args.work/'alone', args.work/'killed'
    log = args.work/'killed.log'
    if killed.exists(): sys.exit(f'{killed} exists: remove {args.work} to begin anew')
    args.work.mkdir(parents=True, exist_ok=True)
    here = provenance(torch.device('cpu'))
    sitting([*cli, str(alone)], args.work/'alone.log')   # one that is there already is left as it is
    steps = Run(alone/args.recipe).summary['steps']
    print(f'alone: {steps} steps', flush=True)
    fell = tortured([*cli, str(killed)], log, killed/args.recipe/'checkpoint.pt', args.kills, steps, args.seed)
    differ = run_differences(alone/args.recipe, killed/args.recipe)
    gone_on = [int(o) for o in re.findall(r'after step (\d+)', log.read_text(encoding='utf-8'))]
    summary = Run(killed/args.recipe).summary
    report = dict(recipe=args.recipe, options=[o for o in options if '/' not in o], steps=steps,
                  kills=[dict(checkpoint_step=a, seconds_later=b) for a, b in fell], gone_on_after_step=gone_on,
                  differences=differ,
                  valid_top1=summary['valid_top1'], data_sha256=summary['data_sha256'], **here)
    write_json(ROOT/'results'/'trust'/f'{args.recipe}.json', report)
    print(json.dumps(report, indent=1))
    return int(bool(differ))


if __name__ == '__main__': sys.exit(main())
