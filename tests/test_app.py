"The app in a browser without a network: a photo goes up, scores, mask and maps come back, the mask comes home; a file that is no photo becomes a message"
import os, shutil, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
FLAGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars'.split()

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    pytest.importorskip('gradio', reason='gradio is not installed: pip install "mctformer_nb[app]"')
    from mctformer_nb.app import run_app
    app = run_app(None, port=0 or 7865, prevent_thread_lock=True, quiet=True, inbrowser=False)
    assert app.local_url.startswith('http://127.0.0.1:')
    yield app.local_url
    app.close()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium drives the browser: pip install selenium')
    chromium, driver = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None), shutil.which('chromedriver')
    if not (chromium and driver): pytest.skip('no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)')
    from selenium.webdriver.chrome.service import Service
    o = webdriver.ChromeOptions(); o.binary_location = chromium
    for f in [*FLAGS, '--window-size=1200,1000', f'--user-data-dir={tmp_path_factory.mktemp("profile")}', '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1']: o.add_argument(f)
    d = webdriver.Chrome(options=o, service=Service(driver)); d.set_page_load_timeout(240)
    yield d
    d.quit()

def wait(what, seconds=180):
    "The first true answer of `what()`"
    end = time.monotonic()+seconds
    while time.monotonic()<end:
        try:
            if found := what(): return found
        except Exception: pass                                   # not there yet
        time.sleep(.5)
    pytest.fail(f'waited {seconds} s in vain')

def test_a_photo_goes_up_and_a_mask_comes_home(page, browser, root, tmp_path):
    import urllib.request
    browser.get(page)
    wait(lambda: browser.find_element('css selector', '#photo input[type=file]')).send_keys(str(root/'mctformer_nb/data/cat.jpg'))
    wait(lambda: browser.execute_script('return document.querySelector("#scores").innerText').lower().strip().find('cat')>=0)
    link = wait(lambda: next(a.get_attribute('href') for a in browser.find_elements('css selector', '#file a') if 'mask' in (a.get_attribute('href') or '')))
    wait(lambda: browser.execute_script('return [...document.querySelectorAll("#mask img, #maps img")].filter(i => i.complete && i.naturalWidth).length')>=2)
    with urllib.request.urlopen(link) as r: (tmp_path/'mask.png').write_bytes(r.read())
    mask = np.asarray(Image.open(tmp_path/'mask.png')); assert (mask==8).mean()>.1                   # 8: cat
    time.sleep(2); shot = Path(os.environ.get('MCT_SCREENSHOTS', tmp_path))/'app.png'; browser.save_screenshot(str(shot)); assert shot.stat().st_size>20_000

def test_what_is_no_photo_is_said(page, browser, tmp_path):
    (tmp_path/'notes.jpg').write_text('these are notes'); browser.get(page)
    wait(lambda: browser.find_element('css selector', '#photo input[type=file]')).send_keys(str(tmp_path/'notes.jpg'))
    wait(lambda: 'notes.jpg: is not an image' in browser.execute_script('return document.body.innerText'))
