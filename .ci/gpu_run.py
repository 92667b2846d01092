"""What `gpu.py run` needs: the archive in parts, training in a process of its own, what comes back of it."""
import hashlib
import json
import os
import shutil
import struct
import sys
import tarfile
import time
import traceback
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

MIB = 2**20
PART_MIB, MAX_FILES, MAX_WEIGHTS_MIB = 15, 8, 60   # a lent machine gives 8 files back, 16 MiB each, 64 in all
SMALL = 'ended.json', 'summary.json', 'log.csv', 'valid_predictions.csv', 'config.json'   # of a run's folder


# --- in the process that trains ---

def train_it(args):
    "Pack, train until the clock says so, evaluate the averaged weights."
    from vit_tinyimagenet import cli
    from vit_tinyimagenet.runs import runner
    home, start = args.work/'home', time.monotonic()
    os.environ['VIT_TINYIMAGENET_HOME'] = str(home)
    recipe = cli.parse(args.more).recipe
    train = replace(recipe.train, device=args.device)
    recipe = replace(recipe, data=str(args.data) if args.data else recipe.data, train=train)
    if args.ended_by: return evaluate_it(recipe, args.work/recipe.name, home, args.ended_by)
    runner.recipe_data(recipe, home)   # packed before the clock of the training starts
    print(f'packed in {time.monotonic()-start:.0f} s', flush=True)
    left = args.until-args.reserve-time.time()
    if left <= 0: sys.exit(f'no time to train: {left+args.reserve:.0f} s left, {args.reserve:g} s reserved')
    limits = dict(max_minutes=left/60)
    if args.budget: limits = dict(max_minutes=(left+args.reserve/2)/60, budget_minutes=left/60)
    recipe = replace(recipe, train=replace(train, **limits))
    try: run = runner.train(recipe, args.work, home=home)
    except Exception as e:   # what it had learned is worth an evaluation, in a process without the error
        traceback.print_exc()
        again = ['_train', '--ended_by', f'{type(e).__name__}: {e}'[:400], *sys.argv[2:]]
        os.execv(sys.executable, [sys.executable, sys.argv[0], *again])
    if run.finished: return tell_end(recipe, run.folder, 'itself', run.summary)
    over = time.time() > args.until-args.reserve-1
    evaluate_it(recipe, run.folder, home, 'the clock' if over else 'a signal')


def evaluate_it(recipe, folder, home, ended_by):
    "The averaged weights of the last checkpoint on the clean validation images."
    from vit_tinyimagenet.runs import report, runner
    if not (folder/'checkpoint.pt').exists():
        write_json(folder/'ended.json', dict(ended_by=ended_by, steps=0))
        sys.exit(f'ended by {ended_by}, before the first checkpoint')
    data = runner.recipe_data(recipe, home)
    recipe = runner.resolve_recipe(recipe, data)
    same = runner.identity(recipe, data)
    state, sessions = runner.load_or_init_state(recipe, folder, data, None, same)
    train_on, _ = runner.train_valid_splits(recipe, data)
    job = report.Job(recipe, data, folder, state, sessions, same, train_on=train_on)
    model = recipe.objective.encoder(state.averaged())
    report.release(job)
    answers, eval_s = report.evaluate_valid(job)
    epochs = state.step/-(-len(train_on.labels)//recipe.train.batch_size)
    rate = epochs*len(train_on.labels)/max(state.wall_s, 1e-9)
    tell_end(recipe, folder, ended_by, dict(
        steps=state.step, planned_steps=state.total_steps, epochs=round(epochs, 2), wall_s=state.wall_s,
        **{f'valid_{k}': v for k, v in answers.summary().items()}, eval_s=eval_s,
        n_images=len(answers.labels), images_per_s=rate,
        params=sum(t.numel() for t in model.parameters()), precision=state.precision,
        **(dict(device=state.device.type) | {k: v for k, v in sessions[-1].items() if k != 'precision'})))


def tell_end(recipe, folder, ended_by, facts):
    "ended.json: how far a run came, and what it knew then."
    import torch
    from vit_tinyimagenet.runs.record import peak_gib
    facts = dict(ended_by=ended_by, recipe=recipe.name, planned_epochs=recipe.train.epochs,
                 peak_gib=peak_gib(torch.device(facts['device']))) | facts
    write_json(folder/'ended.json', facts)
    shown = ('epochs', 'steps', 'valid_top1', 'valid_top5', 'wall_s', 'images_per_s', 'peak_gib')
    print(f'ended by {ended_by}:', {k: facts[k] for k in shown}, flush=True)


# --- what comes back ---

def write_json(path, content):
    "Write a file aside and rename it into place."
    aside(path).write_text(json.dumps(content, indent=1, default=str)+'\n', encoding='utf-8')
    os.replace(aside(path), path)


def aside(path): return path.with_name(f'.{path.name}.part')


def small_files(folder, log):
    "The log, and what is small of a run's folder, the most valuable first."
    return [p for p in (log, *(folder/n for n in SMALL), *sorted(folder.glob('*.png'))) if p.exists()]


def mirror(folder, log, out):
    "Copy what is small and new, at most as many files as come back."
    for p in small_files(folder, log)[:MAX_FILES]:
        to, seen = out/p.name, p.stat()
        if to.exists() and (to.stat().st_mtime, to.stat().st_size) == (seen.st_mtime, seen.st_size): continue
        shutil.copy2(p, aside(to))
        os.replace(aside(to), to)


def pack_up(folder, log, out):
    "run.tar.gz of all that is small, then the loose files go, then the weights come in parts."
    mirror(folder, log, out)
    small, tarred = small_files(folder, log), out/'run.tar.gz'
    with tarfile.open(aside(tarred), 'w:gz') as tar:
        for p in small: tar.add(p, p.name)
    os.replace(aside(tarred), tarred)
    for p in small: (out/p.name).unlink(missing_ok=True)
    weights = folder/'model.safetensors'
    if not weights.exists(): return
    content, step = weights.read_bytes(), PART_MIB*MIB
    mib = len(content)/MIB
    parts = [content[i:i+step] for i in range(0, len(content), step)]
    if mib > MAX_WEIGHTS_MIB: return print(f'weights too large to come back: {mib:.0f} MiB')
    for i, part in enumerate(parts):   # `cat model.safetensors.*` puts them together
        (out/(weights.name+(f'.{i}' if len(parts) > 1 else ''))).write_bytes(part)


# --- the archive in parts, for a machine that takes small parcels ---

def header_of(jpeg):
    "A JPEG up to the end of its start-of-scan segment, and the rest."
    at = 2
    while at+4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker, n = jpeg[at+1], struct.unpack('>H', jpeg[at+2:at+4])[0]
        at += 2+n
        if marker == 0xDA: return jpeg[:at], jpeg[at:]
    return b'', jpeg


def cut(source, out, mib):
    "Write part0.bin, part1.bin, ...; nearly all of the JPEGs share a few headers, which are kept once."
    headers, texts, whole = {}, {}, hashlib.sha256()
    names, which, sizes, bodies = [], [], [], []
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source) as z:
        # folders are made anew, and boxes are of no use to a classifier
        for name in sorted(n for n in z.namelist() if not n.endswith(('/', '_boxes.txt'))):
            content = z.read(name)
            if not name.endswith('.JPEG'):
                texts[name] = content.decode()
                continue
            head, body = header_of(content)
            which.append(headers.setdefault(head, len(headers)))
            names.append(name)
            sizes.append(len(body))
            bodies.append(body)
            whole.update(content)
    index = dict(names=names, which=which, sizes=sizes, headers=[h.hex() for h in headers], texts=texts,
                 sha256=whole.hexdigest())
    packed, step = zlib.compress(json.dumps(index).encode(), 9), int(mib*MIB)
    blob = struct.pack('>Q', len(packed))+packed+b''.join(bodies)
    parts = [blob[i:i+step] for i in range(0, len(blob), step)]
    for i, part in enumerate(parts): (out/f'part{i}.bin').write_bytes(part)
    print(f'{len(names)} images, {len(headers)} headers, {len(blob)/MIB:.1f} MiB in {len(parts)} parts')


def join(folder, out):
    "The archive in the official layout, members stored; ends the program where a part is missing or damaged."
    parts = sorted(folder.glob('part*.bin'), key=lambda p: int(p.stem[4:]))
    if not parts: sys.exit(f'{folder}: no part*.bin')
    try: write_archive(b''.join(p.read_bytes() for p in parts), Path(out))
    except (ValueError, struct.error, zlib.error):
        Path(out).unlink(missing_ok=True)
        sys.exit(f'{folder}: parts are missing, or not what they were: {[p.name for p in parts]}')


def write_archive(blob, out):
    "Put the files together again; raises `ValueError` where they are not those that were cut."
    n = struct.unpack('>Q', blob[:8])[0]
    index = json.loads(zlib.decompress(blob[8:8+n]))
    headers, at, whole = [bytes.fromhex(h) for h in index['headers']], 8+n, hashlib.sha256()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_STORED) as z:
        for name, text in index['texts'].items(): z.writestr(name, text)
        for name, h, size in zip(index['names'], index['which'], index['sizes']):
            content, at = headers[h]+blob[at:at+size], at+size
            whole.update(content)
            z.writestr(name, content)
    if at != len(blob) or whole.hexdigest() != index['sha256']: raise ValueError('not what was cut')
    print(f"{len(index['names'])} images, {out.stat().st_size/MIB:.1f} MiB", flush=True)
