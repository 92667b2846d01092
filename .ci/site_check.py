"""Check the built site: links and anchors, images and their texts, titles, nothing left of what pages are made from.

`site_check.py _docs/html`. Where there is a Chromium, some pages are also looked at in it, on a desk and on a phone,
light and dark: by axe-core's rules for readers who see little, or hear the page read out, and for anything wider than
the screen.
"""
import argparse
import re
import sys
import threading
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from cells import ROOT, browser_path

SEEN = '''index quickstart api changelog search 2_models/index 2_models/vit 9_results/leaderboard
    9_results/pretraining'''.split()
VIEWS = (1280, 'light'), (1280, 'dark'), (390, 'light')
# of nbdev's directives and this machine in code, of Markdown in prose
IN_CODE = re.compile(rf'^ *# *\| *\w.*|file://.*|{re.escape(str(ROOT))}', re.MULTILINE)
IN_PROSE = re.compile(r'^:::.*|^ *\|.*\|$|\{\w+:?\w+\}`.*|\]\([\w.].*|^#+ .*', re.MULTILINE)


class Page(HTMLParser):
    "What of a page is checked: its ids, links, images, headings and texts."
    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.images, self.loaded = path, set(), [], [], []
        self.h1, self.title, self.inside, self.texts = 0, '', [], dict(pre='', code='', prose='')
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get('id') or attrs.get('name'))
        if tag in ('a', 'link') and attrs.get('href'): self.links.append(attrs['href'])
        if tag == 'img': self.images.append(attrs)
        if tag in ('img', 'script') and attrs.get('src'): self.loaded.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') == 'stylesheet': self.loaded.append(attrs['href'])
        if tag in ('script', 'style', 'title', 'svg', 'pre', 'code'): self.inside.append(tag)
        self.h1 += tag == 'h1'

    def handle_endtag(self, tag):
        if self.inside[-1:] == [tag]: self.inside.pop()

    def handle_data(self, data):
        place = self.inside[0] if self.inside else 'prose'
        if place == 'title': self.title += data
        elif place in self.texts: self.texts[place] += data


def is_elsewhere(link): return bool(re.match('[a-z]+:|//', link))


def page_complaints(page, site):
    "What is wrong with one page; `site` gives another page by its path."
    if not page.title.strip(): yield 'no title'
    if page.h1 != 1: yield f'{page.h1} headings of the first level'
    for link in {o for o in page.links if not is_elsewhere(o)}:
        path, anchor = urldefrag(link)
        path = unquote(path.partition('?')[0])
        to = (page.path.parent/path).resolve() if path else page.path
        if path.endswith('.ipynb'): yield f'{link}: a notebook, where there is a page'
        elif not to.is_file(): yield f'{link}: leads to nothing'
        elif anchor and to.suffix == '.html' and unquote(anchor) not in site(to).ids: yield f'{link}: no such place'
    for src in {*page.loaded}:
        if is_elsewhere(src): yield f'{src}: from elsewhere, where readers would be seen'
        elif not (page.path.parent/unquote(src.partition('?')[0])).is_file(): yield f'{src}: missing'
    for o in page.images:
        if not o.get('alt') or o['alt'] == o['src'] or o['alt'].startswith('_images'): yield f"{o['src']}: no alt text"
    for found in IN_CODE.search(page.texts['pre']), IN_PROSE.search(page.texts['prose']):
        if found: yield f'{found[0][:60]!r}: left over'


def served(folder):
    "A server of the site, on a port of its own."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}'


def seen_complaints(page):
    "What axe-core finds, and what is wider than the screen."
    for o in Axe().run(page).response['violations']:
        at = [f"{n['target'][0]} {n['failureSummary'].splitlines()[1].strip()}" for n in o['nodes']]
        yield f"{o['id']} ({o['impact']}, {len(at)} times): {at[0]}"
    over = page.evaluate('document.documentElement.scrollWidth - innerWidth')
    if over > 0: yield f'{over} pixels wider than the screen'


def look(folder, chromium):
    "Complaints about the pages in `SEEN`, in a browser."
    url = served(folder)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        for width, theme in VIEWS:
            context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=theme)
            page = context.new_page()
            for name in SEEN:
                page.goto(f'{url}/{name}.html' + ('?q=fix_val' if name == 'search' else ''))
                if name == 'search': page.locator('#search-results li').first.wait_for()
                yield from (f'{name}.html, {theme}, {width} pixels: {o}' for o in seen_complaints(page))
            context.close()
        browser.close()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path)
    folder = p.parse_args().folder.resolve()
    site = cache(Page)
    pages = [site(o) for o in sorted(folder.rglob('*.html'))]
    found = [f'{o.path.relative_to(folder)}: {c}' for o in pages for c in page_complaints(o, site)]
    if chromium := browser_path(): found += look(folder, chromium)
    for o in found: print(f'FAIL {o}')
    looked = f'{len(SEEN)} of them seen in {chromium}' if chromium else 'none seen: no Chromium here'
    print(f'{len(pages)} pages, {sum(len(o.links) for o in pages)} links, {sum(len(o.images) for o in pages)} images; '
          f'{looked}; {len(found)} complaints')
    return int(bool(found))


if __name__ == '__main__': sys.exit(main())
