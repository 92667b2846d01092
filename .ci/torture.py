"""Kill with SIGKILL at random moments, start again, and hold the end against that of a run left alone.

`make torture` does so in a step, in the writing of a checkpoint, in an evaluation and in the record of the end; in
packing the images and in sorting val/; and with one of two processes. A full disk and a second place that is gone come
after. It writes results/trust/torture.json. `--data` names the archive; without it the synthetic twin is used.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from statistics import median

import torch

from cells import ROOT
from vit_tinyimagenet.cli import train_main
from vit_tinyimagenet.data import layout, pack as data
from vit_tinyimagenet.data.synthetic import make_synthetic
from vit_tinyimagenet.runs import recipe, runner
from vit_tinyimagenet.runs.record import provenance, run_differences, write_json
from vit_tinyimagenet.training import loop

PLACES = dict(step=(loop, 'train_step'), checkpoint=(runner, 'save_checkpoint'), evaluation=(recipe, 'predict_split'),
              record=(runner, 'finish_record'), pack=(data, '_fill'), fix_val=(layout, 'fix_val'))
OPTIONS = '''--classes 4 --train.epochs 8 --train.batch-size 64 --train.watch minival --train.checkpoint-minutes 1e-6
    --model.drop-rate .1 --model.drop-path-rate .1 --augment.degrees 15'''.split()   # all that could go astray
STEPS = 8   # at most so many are let pass before a kill


# --- the side that is killed ---

def watched(fifo, what, *argv):
    "Do one thing of the package, and write to a pipe when a place is entered and left."
    out = open(fifo, 'w', buffering=1, encoding='utf-8')
    def tell(inner, place):
        def told(*args, **kw):
            out.write(f'{os.getpid()} {place} enter\n')
            try: return inner(*args, **kw)
            finally: out.write(f'{os.getpid()} {place} leave\n')
        return told
    for place, (module, name) in PLACES.items(): setattr(module, name, tell(getattr(module, name), place))
    if what == 'train': train_main([*argv])
    if what == 'pack': data.open_data(argv[0], Path(argv[1]))
    if what == 'fix_val': layout.fix_val(argv[0])


# --- the side that kills ---

class Pipe:
    "What watched processes tell, line by line."
    def __init__(self, path):
        if path.exists(): path.unlink()
        os.mkfifo(path)
        self.path, self.fd, self.rest = path, os.open(path, os.O_RDWR | os.O_NONBLOCK), ''   # also with no writer there

    def lines(self):
        try: self.rest += os.read(self.fd, 1 << 20).decode()
        except BlockingIOError: pass
        *whole, self.rest = self.rest.split('\n')
        return [(int(pid), place, event == 'enter') for pid, place, event in map(str.split, whole)]


class Fall:
    "Kill the process that enters a place for the nth time, some seconds later."
    def __init__(self, place, nth, delay):
        self.place, self.left, self.delay, self.at, self.pid = place, nth, delay, None, None

    def see(self, pid, place, entered):
        if not entered or place != self.place or self.at: return
        self.left -= 1
        if self.left <= 0: self.pid, self.at = pid, time.monotonic() + self.delay

    def falls(self):
        if self.at is None or time.monotonic() < self.at: return False
        try: os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        return True


def session(command, log, pipe, fall=None, meanwhile=None):
    "One start of a command: how it ended, where it was killed, how long it took to be down, how long each place took."
    open_, took, killed = {}, {}, None
    with open(log, 'a', encoding='utf-8') as f:
        began = f.tell()
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
        while p.poll() is None:
            for pid, place, entered in pipe.lines():
                if fall: fall.see(pid, place, entered)
                stack = open_.setdefault(pid, [])
                if entered: stack.append((place, time.monotonic()))
                elif stack: took.setdefault(place, []).append(time.monotonic() - stack.pop()[1])
            if fall and killed is None and fall.falls(): killed = time.monotonic()
            if meanwhile: meanwhile()
            time.sleep(.0005)
    pipe.lines()   # the rest belongs to this session
    inside = open_.get(fall.pid) if fall else None
    said = log.read_text(encoding='utf-8')[began:]
    return dict(code=p.returncode, killed_in=inside[-1][0] if inside else 'between', said=said, took=took,
                down_s=killed and time.monotonic() - killed)


def ended(out):
    if out['code']: sys.exit(f"torture: exit code {out['code']}: {out['said'][-2000:]}")
    return out


def gone_on(said):
    "After which step a session resumed; 0 where it began anew."
    return max([int(o) for o in re.findall(r'after step (\d+)', said)], default=0)


class Torture:
    "What all cases share: a folder, a pipe, an archive, a seed, and the kills so far."
    def __init__(self, work, archive, seed):
        self.work, self.archive, self.draw, self.kills = work, archive, random.Random(seed), []
        self.pipe = Pipe(work/'pipe')
        self.python = [sys.executable, __file__, '--watched', str(self.pipe.path)]
        self.train = ['train', 'laptop', '--data', archive, *OPTIONS, '--out']
        self.two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']

    def sit(self, name, command, fall=None, meanwhile=None):
        return session(command, self.work/f'{name}.log', self.pipe, fall, meanwhile)

    def note(self, case, fall, out, **more):
        hit = out['code'] == -signal.SIGKILL or 'exitcode: -9)' in out['said']   # as torchrun says of its processes
        if out['down_s'] is None or not hit: sys.exit(f'torture: {case} ended before it was killed: fewer kills')
        self.kills.append(dict(case=case, aimed_at=fall.place, seconds_later=round(fall.delay, 4),
                               killed_in=out['killed_in'], **more))
        print(json.dumps(self.kills[-1]), flush=True)

    def then(self, case, out):
        "Note for the last kill of a run from which step the next start went on."
        if self.kills and self.kills[-1]['case'] == case: self.kills[-1]['then_from'] = gone_on(out['said'])

    def training(self, n):
        "One run, killed n times in each of its places, its end last."
        alone = ended(self.sit('alone', [*self.python, *self.train, str(self.work/'alone')]))
        command = [*self.python, *self.train, str(self.work/'killed')]
        places = [p for p in ('step', 'checkpoint', 'evaluation') for _ in range(n)]
        order = self.draw.sample(places, len(places)) + ['record']*n
        for place in order:
            nth = self.draw.randint(1, STEPS) if place in ('step', 'checkpoint') else 1
            longest = .5 if place == 'record' else 1   # or the run might end before
            fall = Fall(place, nth, self.draw.uniform(0, longest*median(alone['took'][place])))
            out = self.sit('killed', command, fall)
            self.then('one process', out)
            self.note('one process', fall, out)
        self.then('one process', ended(self.sit('killed', command)))
        return run_differences(self.work/'alone'/'laptop', self.work/'killed'/'laptop')

    def packing(self, n):
        "The images are packed; killed n times, then let finish."
        home = lambda name: self.work/f'home_{name}'
        pack = lambda name: [*self.python, 'pack', self.archive, str(home(name))]
        seconds = ended(self.sit('pack', pack('alone')))['took']['pack'][0]
        for _ in range(n):
            fall = Fall('pack', 1, self.draw.uniform(0, .7*seconds))
            self.note('pack', fall, self.sit('pack', pack('killed'), fall))
        ended(self.sit('pack', pack('killed')))
        both = ('alone', 'killed')
        packs = [data.open_data(self.archive, home(name)) for name in both]
        names = [sorted(p.relative_to(home(name)).as_posix() for p in home(name).rglob('*')) for name in both]
        same = packs[0].info == packs[1].info and all(p.is_intact() for p in packs) and names[0] == names[1]
        for name in both: shutil.rmtree(home(name))
        return [] if same else ['pack']

    def sorting(self, n):
        "val/ is sorted into class folders, each time anew; killed, then let finish."
        tree = lambda name: self.work/f'val_{name}'
        with zipfile.ZipFile(self.archive) as z:
            few = lambda o: '/test/' not in o and ('/train/' not in o or o.endswith('_0.JPEG'))   # one image a class
            wanted = [o for o in z.namelist() if few(o)]
            z.extractall(tree('alone'), wanted)
        shutil.copytree(tree('alone'), tree('fresh'))
        sort = lambda name: [*self.python, 'fix_val', str(tree(name))]
        files = lambda name: {p.relative_to(tree(name)): p.read_bytes() for p in tree(name).rglob('*') if p.is_file()}
        seconds, differ = ended(self.sit('fix_val', sort('alone')))['took']['fix_val'][0], []
        for _ in range(n):
            shutil.copytree(tree('fresh'), tree('killed'))
            fall = Fall('fix_val', 1, self.draw.uniform(0, .7*seconds))
            self.note('fix_val', fall, self.sit('fix_val', sort('killed'), fall))
            ended(self.sit('fix_val', sort('killed')))
            if files('killed') != files('alone'): differ.append('fix_val')
            shutil.rmtree(tree('killed'))
        return differ

    def ranks(self, n):
        "One of two processes is killed: the job ends, and goes on when started again; n times, then to the end."
        job = lambda name: [*self.two, *self.python[1:], *self.train, str(self.work/name)]
        ended(self.sit('two', job('two')))
        for _ in range(n):
            fall = Fall('step', self.draw.randint(2, 2*STEPS), self.draw.uniform(0, .1))
            out = self.sit('two_killed', job('two_killed'), fall)
            self.then('one of two processes', out)
            down_s, told = round(out['down_s'] or 0, 1), 'has died' in out['said']
            self.note('one of two processes', fall, out, down_s=down_s, told=told)
        self.then('one of two processes', ended(self.sit('two_killed', job('two_killed'))))
        return run_differences(self.work/'two'/'laptop', self.work/'two_killed'/'laptop')

    def restarts(self, n):
        "The same, but torchrun itself starts both again, so that the command ends well."
        differ = []
        for i in range(n):
            job = [*self.two, '--max-restarts', '1', *self.python[1:], *self.train, str(self.work/f'elastic_{i}')]
            fall = Fall('step', self.draw.randint(2, 40), self.draw.uniform(0, .1))
            out = ended(self.sit('elastic', job, fall))
            self.note('one of two, --max-restarts 1', fall, out)
            self.then('one of two, --max-restarts 1', out)
            differ += run_differences(self.work/'two'/'laptop', self.work/f'elastic_{i}'/'laptop')
        return differ

    def full_disk(self):
        "The disk is filled up in the middle of a run, and emptied again."
        disk = self.work/'disk'
        disk.mkdir()
        mount = ['mount', '-t', 'tmpfs', '-o', 'size=256m', 'tmpfs', str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return dict(skipped='mounting a small disk needs root')
        checkpoint, filler = disk/'laptop'/'checkpoint.pt', disk/'filler'
        started = []   # to fill it up halfway, not at the first checkpoint
        def fill():
            if checkpoint.exists() and not started: started.append(time.monotonic())
            if not started or time.monotonic() < started[0] + 10 or filler.exists(): return
            with open(filler, 'wb') as f:
                try:
                    while True: f.write(bytes(1 << 20))
                except OSError: pass
        command = [*self.python, *self.train, str(disk)]
        out = self.sit('disk', command, meanwhile=fill)
        message = out['said'].strip().splitlines()[-1].replace(str(self.work), '')
        filler.unlink()
        again = ended(self.sit('disk', command))
        differ = run_differences(self.work/'alone'/'laptop', disk/'laptop')
        subprocess.run(['umount', str(disk)], check=True)
        return dict(code=out['code'], message=message, then_from=gone_on(again['said']), differences=differ)

    def lost_machine(self):
        "The second place is gone for a while; then the first one is lost, with the process."
        drive, away, home = self.work/'drive', self.work/'away', self.work/'lent'
        drive.mkdir()
        command = [*self.python, *self.train, str(home), '--mirror', str(drive)]
        fall = Fall('step', 20, .05)
        def unmount():
            if fall.left == 10 and drive.exists(): drive.rename(away)
            if fall.left == 5 and away.exists(): away.rename(drive)
        out = self.sit('mirror', command, fall, meanwhile=unmount)
        self.note('machine lost', fall, out)
        shutil.rmtree(home)
        again = ended(self.sit('mirror', command))
        self.then('machine lost', again)
        return dict(warned='going on without it' in out['said'],
                    differences=run_differences(self.work/'alone'/'laptop', home/'laptop'))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', help='the archive; by default what TINY_IMAGENET names, or the synthetic twin')
    p.add_argument('--kills', type=int, default=9, help='in each place')
    p.add_argument('--seed', type=int, default=0, help='of the moments')
    p.add_argument('--work', type=Path, default=ROOT/'runs'/'torture', help='where all is kept meanwhile')
    args, here, start = p.parse_args(), provenance(torch.device('cpu')), time.monotonic()
    if args.work.exists(): sys.exit(f'{args.work} exists: remove it to begin anew')
    args.work.mkdir(parents=True)
    archive = args.data or os.environ.get('TINY_IMAGENET') or str(make_synthetic(args.work/'twin.zip'))
    pack = data.open_data(archive)
    t = Torture(args.work, archive, args.seed)
    cases = dict(training=t.training(args.kills), pack=t.packing(args.kills), fix_val=t.sorting(args.kills),
                 two_processes=t.ranks(args.kills), restarts=t.restarts(3))
    disk, machine = t.full_disk(), t.lost_machine()
    lost = [o for differ in [*cases.values(), disk.get('differences', []), machine['differences']] for o in differ]
    places = Counter(k['killed_in'] for k in t.kills)
    report = dict(kills=len(t.kills), killed_in=places, lost=len(lost), differences=cases, full_disk=disk,
                  lost_machine=machine, each=t.kills, options=OPTIONS, seed=args.seed,
                  source=pack.info.source, data_sha256=pack.info.data_sha256,
                  wall_s=round(time.monotonic() - start), **here)
    write_json(ROOT/'results'/'trust'/'torture.json', report)
    print(f"{report['kills']} kills, {report['lost']} things lost")
    shutil.rmtree(args.work)
    return int(bool(lost))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--watched']: watched(*sys.argv[2:])
    else: sys.exit(main())
