#!/usr/bin/env python3
"""What a GPU tells of this package in a quarter of an hour: `smoke`, `speed` and `run`, each within its time.

    gpu.py smoke --out DIR [--seconds 90] [--device cuda]  all checks; smoke.json, and a table, failures first
    gpu.py speed --out DIR [--seconds 90] [--device cuda]  speed.json and speed.csv
    gpu.py run RECIPE --data ZIP --out DIR --minutes 8 [--set train.epochs=60] [-- other options of vit_train]
    gpu.py cut ZIP DIR [--mib 47]                          the archive in parts, see `gpu_run.py`
    gpu.py join DIR ZIP                                    the archive again, every image byte for byte

It needs neither nbdev nor an installation: PYTHONPATH names the checkout, and a folder with tyro and others.
What takes time runs in processes of its own, which are killed when time is over; files hold what was found.

The three commands for a machine that is lent for 15 minutes. Each carries the folder .parts with one part of
the archive, the first one also .whl (pip download --no-deps -d .whl tyro typeguard docstring-parser shtab
typing-extensions). The machine has to stay warm between them. Fill in RECIPE, MINUTES and OPTIONS.

1   mkdir -p /tmp/parts && mv .parts/part0.bin /tmp/parts/; python3 -m pip install -q --no-index --no-deps
    --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl; export PYTHONUNBUFFERED=1
    PYTHONPATH=$PWD:/tmp/site; python3 .ci/gpu.py smoke --seconds 90 2>&1 | tee $OUT/log.txt

2   mkdir -p /tmp/parts && mv .parts/part1.bin /tmp/parts/; export PYTHONUNBUFFERED=1
    PYTHONPATH=$PWD:/tmp/site; python3 .ci/gpu.py speed --seconds 90 2>&1 | tee $OUT/log.txt

3   mkdir -p /tmp/parts && mv .parts/part2.bin /tmp/parts/; export PYTHONUNBUFFERED=1
    PYTHONPATH=$PWD:/tmp/site; python3 .ci/gpu.py run RECIPE --parts /tmp/parts
    --data /tmp/tiny-imagenet-200.zip --minutes MINUTES --budget -- OPTIONS
"""
import argparse
import csv
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gpu_run
from gpu_run import MIB, write_json

FIRST = 'facts', 'resume', 'cells', 'compile reduce-overhead', 'compile default'   # checks begun at once
OVER = 'cut: out of time'


# --- processes of their own ---

def spawn(arguments, log, **env):
    "This script with other arguments, in a session of its own."
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONUNBUFFERED': '1', **{k: str(v) for k, v in env.items()}}
    with open(log, 'w', encoding='utf-8') as f:
        return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=env,
                                stdin=subprocess.PIPE, stdout=f, stderr=f, start_new_session=True)


def start(verb, name, args, threads):
    "Start a check or a case; what it finds goes to a file, a row a line."
    slug = re.sub(r'\W+', '-', f'{verb} {name}')
    rows, log = args.work/f'{slug}.rows', args.work/f'{slug}.log'
    rows.touch()
    env = dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_COMPILE_THREADS=2)
    p = spawn([verb, name, '--device', args.device, '--work', args.work, '--rows', rows], log, **env)
    return SimpleNamespace(name=name, p=p, rows=rows, log=log, began=time.monotonic())


def found(child):
    "What a process has found so far; a last line that is not whole is not there yet."
    return [json.loads(line) for line in child.rows.read_text(encoding='utf-8').split('\n')[:-1]]


def send(child, number):
    "A signal to a process and to all that it has started."
    try: os.killpg(child.p.pid, number)
    except (ProcessLookupError, PermissionError): pass


def end(child):
    "Kill a process with all that it has started, if it is still there."
    send(child, signal.SIGKILL)
    child.p.wait()
    child.seconds = round(time.monotonic()-child.began, 1)


def taken_out(running, deadline, limit=float('inf')):
    "Those that have ended, or have to: out of the list, with the reason where that was not by themselves."
    for child in list(running):
        now = time.monotonic()
        if child.p.poll() is not None: why = ''
        elif now > deadline: why = OVER
        elif now-child.began > limit: why = f'cut: hung for {limit:g} s'
        else: continue
        end(child)
        running.remove(child)
        if child.p.returncode and not why:
            said = child.log.read_text(errors='replace', encoding='utf-8').strip()[-400:]
            why = f'exit code {child.p.returncode}: {said}'
        yield child, why


def die_with_parent():
    "Have Linux kill this process when the one that started it is gone."
    try: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (AttributeError, OSError): pass   # another system


def report_to(path):
    "A function that appends a row to a file."
    def report(**row):
        with open(path, 'a', encoding='utf-8') as f: f.write(json.dumps(row)+'\n')
    return report


def told(error):
    "An exception in a line, with the places that it came through."
    places = [f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(error.__traceback__)][-4:]
    return f"{type(error).__name__}: {str(error)[:600]} ({' > '.join(places)})"


def elapsed(args): return round(time.monotonic()-args.start, 1)


# --- smoke ---

def run_check(name, device, work, report):
    "In a process of its own: the rows of one check, and whatever it raises as one more."
    from gpu_checks import CHECKS, HIDDEN
    own = work/re.sub(r'\W+', '-', name)
    own.mkdir(exist_ok=True)
    try:
        for what, ok, note in (CHECKS | HIDDEN)[name](device, own): report(what=what, ok=ok, note=str(note))
    except Exception as e:
        traceback.print_exc()
        report(what='raised', ok=False, note=told(e))


def check_rows(child, why):
    "A check's rows, with one more where it did not end by itself; that is no failure where time was over."
    ok = None if why == OVER else False
    rows = found(child)+([dict(what='did not end', ok=ok, note=why)] if why else [])
    return [dict(check=child.name, seconds=child.seconds, **row) for row in rows]


def all_checks():
    "A process that prints the names of all checks: the package takes seconds to import."
    return subprocess.Popen([sys.executable, __file__, '_names'], stdout=subprocess.PIPE, encoding='utf-8')


def others(asked):
    "The checks besides the first ones; a row where they cannot be told."
    names = [n for n in asked.stdout.read().splitlines() if n not in FIRST]
    failed = dict(check='all', what='import', ok=False, note='the package cannot be imported', seconds=0)
    return names, [] if names else [failed]


def smoke(args):
    "Run the checks, several at once, whatever becomes of each; returns 1 where one fails."
    asked = None if args.only else all_checks()
    deadline, left, running, rows = args.start+args.seconds-2, list(args.only or FIRST), [], []
    def write():
        names = dict(running=[c.name for c in running], not_begun=left)
        write_json(args.out/'smoke.json', dict(device=args.device, seconds=elapsed(args), **names, rows=rows))
    write()
    try:
        while (left or running or asked) and time.monotonic() < deadline:
            if asked and asked.poll() is not None:
                more, failed = others(asked)
                left, rows, asked = left+more, rows+failed, None
            for child, why in taken_out(running, deadline, args.limit):
                rows += check_rows(child, why)
                write()
            while left and len(running) < args.jobs:
                running.append(start('_check', left.pop(0), args, max(1, os.cpu_count()//args.jobs)))
            time.sleep(.05)
    finally:
        for child, why in taken_out(running, 0): rows += check_rows(child, why)
        if asked: asked.kill()
        write()
    rows += [dict(check=n, what='not begun', ok=None, note='out of time', seconds=0) for n in left]
    return print_rows(rows, args)


def print_rows(rows, args):
    "The table, failures first, then what was not checked."
    order, said = {False: 0, None: 1, True: 2}, {False: 'FAILED', None: '-', True: 'ok'}
    for r in sorted(rows, key=lambda r: order[r['ok']]):
        print(f"{said[r['ok']]:7}{r['check']:24} {r['what']:28} {r['note']}")
    n = Counter(said[r['ok']] for r in rows)
    print(f"{n['FAILED']} failed, {n['ok']} passed, {n['-']} not checked, {elapsed(args):.0f} s")
    return int(bool(n['FAILED']))


# --- speed ---

def run_case(name, device, work, report):
    "In a process of its own: get ready, wait for the word, measure, then look at the launches."
    from gpu_speed import prepare
    try:
        measure, look = prepare(name, device, report)
        report(stage='ready')
        sys.stdin.readline()
        report(stage='measured', **measure())
        if look: report(stage='looked', **look())
    except Exception as e:
        traceback.print_exc()
        report(stage='failed', error=told(e))


def reached(child, stage): return any(row['stage'] in (stage, 'failed') for row in found(child))


def measure_alone(child, others, seconds):
    "Let one process measure while the others stand still."
    for other in others: send(other, signal.SIGSTOP)
    try:
        time.sleep(.15)   # what they have given the device to do comes to its end
        child.p.stdin.write(b'\n')
        child.p.stdin.flush()
        until = time.monotonic()+seconds
        while time.monotonic() < until and child.p.poll() is None:
            if reached(child, 'measured'): break
            time.sleep(.02)
    except BrokenPipeError: pass
    finally:
        for other in others: send(other, signal.SIGCONT)


def case_row(child, why):
    "All that a process has found, as one row."
    out = dict(case=child.name)
    for row in found(child): out |= {k: v for k, v in row.items() if k != 'stage'}
    return out | (dict(cut=why) if why else {})


def speed(args):
    "Measure the cases: they get ready side by side, and are measured one at a time, the others stopped."
    from gpu_speed import CASES
    names = args.only or list(CASES)
    deadline, left, running, measured, done = args.start+args.seconds-2, list(names), [], set(), {}
    def write(): write_speed(args, [done.get(n, dict(case=n, cut='not measured')) for n in names])
    write()
    try:
        while (left or running) and (now := time.monotonic()) < deadline:
            for child, why in taken_out(running, deadline):
                done[child.name] = case_row(child, why)
                write()
            for name in [n for n in left if deadline-now < CASES[n][2]]:
                left.remove(name)
                done[name] = dict(case=name, cut=f'not begun: it needs {CASES[name][2]} s')
            while left and len(running) < args.jobs: running.append(start('_case', left.pop(0), args, 1))
            waiting = (c for c in running if c.name not in measured and c.p.poll() is None)
            if child := next((c for c in waiting if reached(c, 'ready')), None):
                measured.add(child.name)
                measure_alone(child, [c for c in running if c is not child], min(20, deadline-now))
            time.sleep(.05)
    finally:
        for child, why in taken_out(running, 0): done[child.name] = case_row(child, why)
        write()
    return print_speed(args)


def write_speed(args, rows):
    "speed.json and speed.csv, with the share of the matrix rate where that was measured."
    rates = next((r for r in rows if r['case'] == 'rates'), {})
    for r in rows:
        rate = rates.get(f"matrix_tflop_per_s_{r.get('precision')}")
        if rate and 'images_per_s' in r:
            r['share_of_matrix_rate'] = round(r['images_per_s']*r['gflop_per_image']/1e3/rate, 4)
    write_json(args.out/'speed.json', dict(device=args.device, seconds=elapsed(args), rows=rows))
    with open(args.out/'speed.csv', 'w', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
        table.writeheader()
        table.writerows(rows)


SHOWN = dict(images_per_s='images/s', step_ms='step ms', share_of_matrix_rate='of rate', peak_gib='GiB',
             compile_s='compile s', kernels='kernels', launches='launches', waits='waits', busy_ms='busy ms')


def print_speed(args):
    "The table; what was cut says so."
    rows = json.loads((args.out/'speed.json').read_text(encoding='utf-8'))['rows']
    print(f"{'case':44}", *(f'{title:>10}' for title in SHOWN.values()))
    for r in rows:
        note = r.get('error') or r.get('cut') or {k: v for k, v in r.items() if '_per_s_' in k} or ''
        print(f"{r['case']:44}", *(f"{r.get(c, ''):>10}" for c in SHOWN), str(note)[:300])
    print(f"{sum('images_per_s' in r for r in rows)} of {len(rows)} cases, {elapsed(args):.0f} s")
    return 0


# --- run ---

def options(args):
    "The arguments of vit_train: those of --set, and what follows --."
    pairs = [pair.partition('=') for pair in args.set]
    return [args.recipe, *(a for k, _, v in pairs for a in (f'--{k}', *v.split(','))), *args.more]


def run(args):
    "The one long run, its small files copied as they change; returns its exit code."
    if args.parts: gpu_run.join(args.parts, args.data)
    deadline, log, folder = args.start+60*args.minutes, args.work/'run.log', args.work/args.recipe
    data = ['--data', args.data] if args.data else []
    until = time.time()+deadline-time.monotonic()
    own = ['--work', args.work, '--until', until, '--reserve', args.reserve, '--device', args.device]
    budget = ['--budget'] if args.budget else []
    p = spawn(['_train', *own, *data, *budget, '--', *options(args)], log)
    child, printed = SimpleNamespace(p=p, began=time.monotonic()), 0
    def stop(number, frame):   # the training saves, and there is time for its evaluation
        nonlocal deadline
        deadline = min(deadline, time.monotonic()+args.reserve)
        p.terminate()
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, stop)
    try:
        while p.poll() is None and time.monotonic() < deadline-5:
            gpu_run.mirror(folder, log, args.out)
            printed = echo(log, printed)
            time.sleep(1)
        if p.poll() is None: print('out of time, and killed')
    finally:
        end(child)
        echo(log, printed)
        gpu_run.pack_up(folder, log, args.out)
    sizes = sorted(f'{o.name} {o.stat().st_size/MIB:.2f} MiB' for o in args.out.iterdir())
    print(f'{elapsed(args):.0f} s; {sizes}')
    return p.returncode


def echo(log, printed):
    "Print what is new in a log; up to where it is printed."
    with open(log, errors='replace', encoding='utf-8') as f:
        f.seek(printed)
        print(f.read(), end='', flush=True)
        return f.tell()


# --- the command line ---

def parsed(argv):
    "The command line; what follows -- is for vit_train."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = p.add_subparsers(dest='verb', required=True)
    subs = {name: verbs.add_parser(name) for name in ('smoke', 'speed', 'run', 'cut', 'join')}
    for name in ('smoke', 'speed', 'run'):
        add = subs[name].add_argument
        add('--out', type=Path, default=os.environ.get('OUT'), help='a folder; $OUT where that is set')
        add('--device', default='cuda', help="'cpu' to rehearse, with all that is measured small")
    for name in ('smoke', 'speed'):
        add = subs[name].add_argument
        add('--seconds', type=float, default=90)
        add('--only', nargs='*', help='checks or cases by name')
        add('--jobs', type=int, default=max(2, min(14, os.cpu_count()-2)), help='at once')
    subs['smoke'].add_argument('--limit', type=float, default=float('inf'), help='seconds for one check')
    add = subs['run'].add_argument
    add('recipe')
    add('--data', type=Path, help='the archive; with --parts, where it is put')
    add('--parts', type=Path, help='a folder with the parts of the archive')
    add('--minutes', type=float, required=True, help='from the start of the command to its end')
    add('--reserve', type=float, default=35, help='seconds of them for what follows the training')
    add('--budget', action='store_true', help='fit the whole schedule into the time, not only its beginning')
    add('--set', nargs='*', default=[], help='field=value of the recipe')
    for name, places in dict(cut=('source', 'folder'), join=('folder', 'target')).items():
        for place in places: subs[name].add_argument(place, type=Path)
    subs['cut'].add_argument('--mib', type=float, default=47)
    for name in ('_check', '_case', '_train', '_names'):   # what this script starts of itself
        sub = verbs.add_parser(name)
        for option in ('--work', '--rows', '--data'): sub.add_argument(option, type=Path)
        for option in ('--until', '--reserve'): sub.add_argument(option, type=float)
        for option in ('--device', '--ended_by'): sub.add_argument(option)
        sub.add_argument('--budget', action='store_true')
        if name in ('_check', '_case'): sub.add_argument('name')
    at = argv.index('--') if '--' in argv else len(argv)
    args = p.parse_args(argv[:at])
    args.more = argv[at+1:]
    return args


def main():
    args = parsed(sys.argv[1:])
    args.start = time.monotonic()
    if args.verb == 'cut': return gpu_run.cut(args.source, args.folder, args.mib)
    if args.verb == 'join': return gpu_run.join(args.folder, args.target)
    if args.verb == '_names':
        from gpu_checks import CHECKS
        return print('\n'.join(CHECKS))
    if args.verb.startswith('_'):
        die_with_parent()
        if args.verb == '_train': return gpu_run.train_it(args)
        do = dict(_check=run_check, _case=run_case)[args.verb]
        return do(args.name, args.device, args.work, report_to(args.rows))
    if not args.out: sys.exit('gpu.py: --out DIR')
    args.out = Path(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    def stop(number, frame): raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        args.work = Path(work)
        return dict(smoke=smoke, speed=speed, run=run)[args.verb](args)


if __name__ == '__main__': sys.exit(main())
