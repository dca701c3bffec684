"""Reports of real runs in a headless Chromium, on a phone's and a desktop's width. 1 min; `make browser`."""

import shutil
import tempfile

import pytest
from hydra import compose, initialize_config_dir

from zoo.recipes import cli, config, report, run_folder, scenes, tasks

pytestmark = pytest.mark.browser

WIDTHS = {"phone": 375, "desktop": 1280}
PAGES = ("classify", "detect", "segment", "evaluation", "comparison")
HOSTILE = "<script>alert(1)</script>"
COMMON = ("log.wandb=disabled", "trainer.device=cpu", "data.num_workers=0")
DENSE = ("dense.digits_first=false", "trainer.batch_size=2", "trainer.max_updates=3", "dense.warmup_updates=0")
WORDS = {
    "classify": ("model=test_vit", "data.img_size=32", "trainer.epochs=2", "trainer.max_updates=24"),
    "detect": ("task=detect", *DENSE),
    "segment": ("task=segment", *DENSE),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Path of each page: of a run of each task, an evaluation and a comparison."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    config.register()
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(cli.CONF, version_base="1.3"):
        patch.setattr(scenes, "SCENES", {"train": 16, "val": 4, "test": 4})
        root = scenes.ensure(folder / "scenes")
        for task, words in WORDS.items():
            data = (f"data.root={root}",) if task != "classify" else ()
            tasks.load(task, "train").train(
                compose("config", [*COMMON, *words, *data, f"run={folder / task}"]), report.write_or_warn
            )
            found[task] = folder / task / "report.html"
        words = (*COMMON, f"run={folder / 'detect'}")
        tasks.load("detect", "evaluate").evaluate(compose("eval", [*words]), [], report.write_or_warn)
    found["evaluation"] = folder / "detect" / "eval" / "report.html"
    other = folder / "other run with a rather long name, as a search over many settings makes it"
    shutil.copytree(folder / "classify", other)
    found["comparison"] = report.make([folder / "classify", other], folder / "comparison.html")
    return found


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver  # which takes a second in each process that collects the tests
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tempfile.mkdtemp()
    quiet = ("quic", "background-networking", "component-update", "sync", "gpu")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for word in ("headless=new", "no-sandbox", "no-first-run", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    for word in quiet:
        options.add_argument(f"--disable-{word}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def show(browser):
    """Open a page at a width, light or dark."""

    def show(path, width, scheme="light"):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(path.as_uri())
        return browser

    return show


every_page = pytest.mark.parametrize("page", PAGES)
every_width = pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)


@every_page
@every_width
def test_console_stays_empty(show, pages, page, width):
    assert show(pages[page], width).get_log("browser") == []


@every_page
@every_width
def test_page_is_not_wider_than_the_window(show, pages, page, width):
    root = "document.documentElement"
    visible, whole = show(pages[page], width).execute_script(f"return [{root}.clientWidth, {root}.scrollWidth]")
    assert width - 20 < whole <= visible  # beside a scroll bar


@every_page
@every_width
def test_figures_are_visible(show, pages, page, width):
    """Each as wide as a finger is long, pictures decoded, and curves within their frames."""
    sizes = show(pages[page], width).execute_script("""
        return [...document.querySelectorAll("svg, img.picture")].map(figure => {
            const box = figure.getBoundingClientRect();
            const inside = [...figure.querySelectorAll("polyline, circle")].every(mark => {
                const part = mark.getBoundingClientRect();
                return part.left >= box.left && part.right <= box.right && part.top >= box.top - 2
                    && part.bottom <= box.bottom;
            });
            return [box.width >= 250 && box.height >= 120 && figure.naturalWidth !== 0, inside];
        })""")
    assert len(sizes) >= (1 if page == "evaluation" else 3)
    assert all(large and inside for large, inside in sizes)


@every_page
@every_width
def test_text_of_figures_can_be_read(show, pages, page, width):
    heights = show(pages[page], width).execute_script(
        'return [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)'
    )
    assert all(height > 12 for height in heights)


@pytest.mark.parametrize("page", ["classify", "detect", "segment", "evaluation"])
@every_width
def test_sample_predictions_are_seen_whole_with_captions_to_read(show, pages, page, width):
    """Within the window without scrolling sideways; a detector's large enough for the names in them."""
    samples = show(pages[page], width).execute_script("""
        return [...document.querySelectorAll(".samples figure")].map(figure => {
            const image = figure.querySelector("img"), box = image.getBoundingClientRect();
            const caption = getComputedStyle(figure.querySelector("figcaption")).fontSize;
            return [box.left >= 0 && box.right <= innerWidth && image.naturalWidth > 0, box.width, parseFloat(caption)];
        })""")
    assert len(samples) >= 8
    assert all(whole for whole, _, _ in samples)
    assert min(shown for _, shown, _ in samples) >= {"classify": 95, "segment": 140}.get(page, 220)
    assert min(letters for _, _, letters in samples) >= 12


@every_page
def test_nothing_is_loaded(show, pages, page):
    names = show(pages[page], 1280).execute_script(
        'return performance.getEntriesByType("resource").map(entry => entry.name)'
    )
    assert [name for name in names if not name.startswith("data:")] == []


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_system(show, pages, scheme, dark):
    colour = show(pages["classify"], 1280, scheme).execute_script(
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    page, text = (int(value.partition("(")[2].partition(",")[0]) for value in colour)
    assert (page < text) == dark


def test_hostile_class_names_are_text(show, pages, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pages["classify"].parent, folder)
    names = [HOSTILE, *"123456789"]
    run_folder.write_classes(folder, names, {"top1": [50.0] * 10}, [4] * 10, "images", [[0, 1, 2], [0, 0, 2]])
    driver = show(report.make([folder], None), 1280)
    assert driver.execute_script("return document.scripts.length") == 0
    assert HOSTILE in driver.execute_script("return document.body.innerText")
    assert driver.get_log("browser") == []
