"The site: built once from the executed notebooks; its links, pictures, words for pictures and mathematics; then read in a browser without a network"
import os, re, shutil, subprocess, sys, time
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest

pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11'); pytest.importorskip('math_core')

class Page(HTMLParser):
    "What the tests look at in a page: links, ids, pictures, text outside of code"
    def __init__(self, path):
        super().__init__(); self.path, self.ids, self.links, self.pictures, self.words, self.depth = path, set(), [], [], [], []
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.ids |= {v for k,v in attrs if k in ('id', 'name') and v}
        if tag in ('pre', 'code', 'script', 'style', 'math'): self.depth.append(tag)
        if tag == 'img': self.pictures.append(a)
        self.links += [(tag, v) for k,v in attrs if k in ('href', 'src') and v]
    def handle_endtag(self, tag):
        if self.depth and self.depth[-1] == tag: self.depth.pop()
    def handle_data(self, s):
        if not self.depth: self.words.append(s)

@pytest.fixture(scope='module')
def site(tmp_path_factory, root):
    "Folder of the site; built in a folder of its own, so that two builds at once do not meet"
    out = tmp_path_factory.mktemp('site')/'_docs'; before = os.times()
    r = subprocess.run([sys.executable, 'tools/docs.py', '--out', str(out)], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert (now := os.times()).children_user + now.children_system - before.children_user - before.children_system < 90, 'seconds of a processor'
    return out

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}

def sources(root): return [p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(root/'nbs').parts)]

def test_every_notebook_and_module_has_a_page(pages, root):
    want = {p.with_name(re.sub(r'^\d+[a-z]?_', '', p.stem)+'.html').as_posix() for p in sources(root)} | {'changelog.html'}
    want |= {f'api/{p.stem}.html' for p in (root/'mctformer_nb').glob('*.py') if p.stem not in ('__init__', '_modidx')}
    assert want == set(pages)

def test_reading_order(pages, root):
    "The sidebar has the numbered notebooks by number, then the rest, and every page of it"
    side = re.search(r'<nav[^>]*id="quarto-sidebar".*?</nav>', pages['index.html'].path.read_text(encoding='utf-8'), re.S)[0]
    hrefs = [h.removeprefix('./') for h in re.findall(r'href="([^"#]+\.html)"', side)]
    story = [re.sub(r'^\d+[a-z]?_', '', p.stem)+'.html' for p in sorted(sources(root)) if re.match(r'\d', p.name)]
    assert story[0] == 'paper.html' and [h for h in dict.fromkeys(hrefs) if h in story] == story and set(pages) == set(hrefs) | {'index.html'}

def test_links(pages, site):
    dead = []
    for name,page in pages.items():
        for tag,link in page.links:
            if re.match(r'(https?:|mailto:|data:|javascript:)', link): continue
            path, frag = urldefrag(link); target = (page.path.parent/unquote(path)).resolve() if path else page.path.resolve()
            known = pages.get(target.relative_to(site.resolve()).as_posix()) if target.is_relative_to(site.resolve()) else None
            if not target.is_file() or (frag and known and unquote(frag) not in known.ids): dead.append(f'{name}: <{tag}> {link}')
    assert not dead, '\n'.join(dead)

def test_nothing_comes_from_elsewhere(pages, site):
    "Links may lead away; styles, scripts, fonts and pictures are the site's own"
    wrong = [f'{n}: {l}' for n,p in pages.items() for tag,l in p.links if tag in ('script', 'link', 'img', 'iframe', 'source') and re.match(r'(https?:)?//', l)]
    wrong += [f'{f.name}: {m}' for f in site.rglob('*.css') for m in re.findall(r'(?:url\(|@import)\s*["\']?((?:https?:)?//[^"\')\s]+)', f.read_text(encoding='utf-8'))]
    assert not wrong, '\n'.join(wrong)

def test_pictures_have_words(pages):
    wrong = [f"{n}: {str(i.get('src'))[:60]}" for n,p in pages.items() for i in p.pictures if not (i.get('alt') or '').strip()]
    assert not wrong, '\n'.join(wrong)

def test_no_raw_tex(pages):
    raw = re.compile(r'\$[^$\n]*\\[a-zA-Z]+[^$\n]*\$|\\(?:mathbf|mathrm|frac|sum|hat|text|operatorname|odot|left|right|begin|end|tag)\b|\\[(\[]')
    wrong = [f'{n}: {m[0][:80]}' for n,p in pages.items() for m in [raw.search(''.join(p.words))] if m]
    assert not wrong, '\n'.join(wrong)
    html = [p.path.read_text(encoding='utf-8') for p in pages.values()]
    assert sum(h.count('<math') for h in html) > 100 and not any('<merror' in h or 'katex' in h.lower() for h in html)

def test_callouts_and_directives(pages):
    words = {n: ''.join(p.words) for n,p in pages.items()}
    assert not [n for n,w in words.items() if re.search(r'^\s*:::|#\|\s*(hide|export|default_exp|slow)', w, re.M)]
    code = [n for n,p in pages.items() if re.search(r'#\|\s*(hide|exporti?|default_exp|slow|data|gpu)\b', re.sub(r'<[^>]+>', '', p.path.read_text(encoding='utf-8'))) and n.startswith('api/')]
    assert not code

def test_quarto_settings_stay_valid(root):
    import yaml
    conf = yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))
    assert conf['project']['type'] == 'website' and conf['format']['html']['css'] == 'styles.css' and conf['metadata-files'] == ['nbdev.yml', 'sidebar.yml']

# ---- in a browser

FLAGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars'.split()

@lru_cache
def programs(): return next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None), shutil.which('chromedriver')

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium drives the browser: pip install selenium')
    chromium, driver = programs()
    if not (chromium and driver): pytest.skip('no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)')
    from selenium.webdriver.chrome.service import Service
    o = webdriver.ChromeOptions(); o.binary_location = chromium; o.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    for f in [*FLAGS, '--window-size=1300,1000', f'--user-data-dir={tmp_path_factory.mktemp("profile")}']: o.add_argument(f)
    d = webdriver.Chrome(options=o, service=Service(driver)); d.set_page_load_timeout(240)
    yield d
    d.quit()

def errors(browser): return [l['message'] for l in browser.get_log('browser') if l['level'] in ('SEVERE', 'WARNING')]

def six(pages):
    "Landing, the paper, story, tutorial, table, API; a story page instead of what does not exist yet"
    first = lambda folder, other: next((n for n in pages if n.startswith(folder)), other)
    return ['index.html', 'paper.html', 'attention.html', first('tutorials/', 'seeds.html'), first('tables/', 'tables.html'), 'api/seeds.html']

@pytest.mark.slow
def test_six_pages(browser, pages, site):
    for name in six(pages):
        browser.get((site/name).as_uri())
        assert browser.execute_script('return document.querySelector("h1").innerText.length') > 3
        broken = browser.execute_script('return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))')
        assert not broken and not errors(browser), f'{name}: {broken}'
        rgb = lambda js: [int(float(v)) for v in re.findall(r'[\d.]+', browser.execute_script(f'return getComputedStyle(document.body).{js}'))[:3]]
        assert sum(rgb('color')) < 200 and sum(rgb('backgroundColor')) > 700, 'dark text on light'
        for width, mobile in ((1300, False), (390, True)):
            browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=mobile))
            assert browser.execute_script('return document.documentElement.scrollWidth') <= width, f'{name} is wider than {width} pixels'
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})

# code, output, tables and formulas that scroll sideways, or end right of the column that they stand in
CUT = """const main = document.querySelector("main"), right = main.getBoundingClientRect().right + 2;
return [...main.querySelectorAll("pre, table, div.sourceCode, .cell-output-display, span.math.display")]
  .filter(e => e.offsetParent && e.clientWidth && (e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > right))
  .map(e => e.tagName + " " + e.scrollWidth + " in " + e.clientWidth + ": " + e.innerText.slice(0, 60))"""

# words of a table, other than code, that are broken in the middle
BROKEN = """const broken = [], range = document.createRange();
for (const cell of document.querySelectorAll("main th, main td")) {
  const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  for (let t; t = walk.nextNode();) if (!t.parentElement.closest("code, pre, math")) for (const m of t.data.matchAll(/[\\w.±\\u00a0]{2,14}/g)) {
    range.setStart(t, m.index); range.setEnd(t, m.index + m[0].length);
    if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push("broken in a table: " + m[0]);
  } }
return broken"""

@pytest.mark.slow
def test_nothing_is_cut(browser, pages, site):
    "At 1300 pixels no page has a line of code, a table or a formula that ends outside of what a reader sees, or a table that breaks words"
    browser.set_window_size(1300, 1000); cut = []
    for name in pages:
        browser.get((site/name).as_uri())
        assert browser.execute_script('return window.innerWidth') == 1300
        cut += [f'{name}: {e}' for e in browser.execute_script(CUT) + browser.execute_script(BROKEN)]
    assert not cut, '\n'.join(cut)

@pytest.mark.slow
def test_cutting_is_seen(browser, tmp_path):
    "What the test above looks for: a line too long, a table too wide, and one that fits"
    page = '<main style="width: 500px"><pre style="overflow: auto">%s</pre><table><tr><td style="min-width: %dpx">x</td></tr></table></main>'
    for long,wide,n in (('x', 100, 0), ('x'*200, 100, 1), ('x', 600, 1)):
        (tmp_path/'page.html').write_text(page % (long, wide), encoding='utf-8'); browser.get((tmp_path/'page.html').as_uri())
        assert len(browser.execute_script(CUT)) == n, (long, wide)

@pytest.mark.slow
def test_mathematics_has_a_size(browser, site):
    browser.get((site/'attention.html').as_uri())
    sizes = browser.execute_script('return [...document.querySelectorAll("math")].map(m => m.getBoundingClientRect().width)')
    assert len(sizes) > 5 and min(sizes) > 2

@pytest.mark.slow
def test_search(browser, site):
    from selenium.webdriver.common.by import By
    browser.get((site/'index.html').as_uri())
    box = next(b for b in browser.find_elements(By.CSS_SELECTOR, '.smalldocs-search input') if b.is_displayed()); box.send_keys('random walk')
    found = []
    for _ in range(50):
        found = [a.get_attribute('href') for a in browser.find_elements(By.CSS_SELECTOR, '.smalldocs-search a[href]') if a.is_displayed()]
        if found: break
        time.sleep(.1)
    assert any('random_walk.html' in f for f in found), found
    browser.get(found[0]); assert 'walk' in browser.find_element(By.TAG_NAME, 'main').text.lower() and not errors(browser)
