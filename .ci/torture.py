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
from vit_tinyimagenet.record import Run, provenance, run_differences, write_json


def sitting(command, log, seconds=None):
    "One process of the run, killed after `seconds`; whether it ended by itself."
    with open(log, 'a', encoding='utf-8') as f:
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
        try: code = p.wait(seconds)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            return False
    if code: sys.exit(f'torture: exit code {code}; see {log}')
    return True


def tortured(command, log, kills, wall_s, seed):
    "Run to the end with `kills` kills on the way, at moments drawn from `seed`; the seconds after which they fell."
    draw, fell = random.Random(seed), []
    while len(fell) < kills:
        seconds = wall_s/(kills + 1)*draw.uniform(.5, 1)
        if sitting(command, log, seconds): sys.exit(f'torture: ended after {len(fell)} kills; ask for fewer')
        fell.append(round(seconds, 1))
        print(f'kill {len(fell)} of {kills} after {seconds:.0f} s', flush=True)
    sitting(command, log)
    return fell


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
    start = time.time()
    sitting([*cli, str(alone)], args.work/'alone.log')
    wall_s = time.time() - start
    print(f'alone: {wall_s:.0f} s', flush=True)
    fell = tortured([*cli, str(killed)], log, args.kills, wall_s, args.seed)
    differ = run_differences(alone/args.recipe, killed/args.recipe)
    gone_on = [int(o) for o in re.findall(r'after step (\d+)', log.read_text(encoding='utf-8'))]
    summary = Run(killed/args.recipe).summary
    report = dict(recipe=args.recipe, options=[o for o in options if '/' not in o], steps=summary['steps'],
                  killed_after_s=fell, gone_on_after_step=gone_on, wall_s_alone=wall_s, differences=differ,
                  valid_top1=summary['valid_top1'], data_sha256=summary['data_sha256'], **here)
    write_json(ROOT/'results'/'trust'/f'{args.recipe}.json', report)
    print(json.dumps(report, indent=1))
    return int(bool(differ))


if __name__ == '__main__': sys.exit(main())
