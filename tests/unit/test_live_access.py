"""The live page for everybody: names and roles, keyboard, contrast, phone, motion, and names from outside."""

from __future__ import annotations

import pytest

from tests.live.site import canvas, choose, opened, text
from tests.live.synthetic import Model, info, series, write

# Contrast of every visible text with what is behind it: the nearest opaque background, or the bar of a table's cell.
# Returns the texts below 4.5 : 1 (WCAG 2.2, 1.4.3).
CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const [r, g, b, a = 1] = rgb(getComputedStyle(e).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  let seen = 0;
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest(".hidden, noscript, canvas")) continue;
    seen++;
    const colour = rgb(getComputedStyle(e).color);
    const grounds = [behind(e)];
    const bar = e.closest("td")?.querySelector("i");
    if (bar) grounds.push(rgb(getComputedStyle(bar).backgroundColor));
    const worst = Math.min(...grounds.map((ground) => ratio(colour, ground)));
    if (worst < 4.5) poor.push([walker.currentNode.data.trim(), Math.round(100 * worst) / 100]);
  }
  return { poor, seen };
})()"""

# Everything that can be reached by Tab or read as a structure, without a name.
NAMELESS = """(() => {
  const name = (e) => e.ariaLabel || document.getElementById(e.getAttribute("aria-labelledby"))?.innerText
    || [...(e.labels ?? [])].map((l) => l.innerText).join(" ") || e.innerText?.trim();
  return [...document.querySelectorAll("a, button, select, input, canvas, summary, section, [role], [tabindex]")]
    .filter((e) => e.checkVisibility() && !name(e)).map((e) => e.outerHTML.slice(0, 80));
})()"""


@pytest.fixture
def rich(browser, serve):
    """Open the page with all that it can show, in good state or bad."""

    def start(width: int = 1440, dark: bool = False, wrong: bool = False, fragment: str = ""):
        models = [
            Model(
                layers=12, switch_steps=(20, 40), quantization=True, baseline=True, nonfinite_layer=3 if wrong else None
            ),
            Model(layers=2, engine="1"),
        ]
        made = serve(models, 60)
        if wrong:
            values = {
                series("engine_paused"): 1.0,
                series("config_restart_needed"): 1.0,
                series("probe_errors_total", probe="attention"): 1.0,
            }
            write(made.folder, info("pp0-tp1"), values)
            made.history.record()
        page = opened(browser, made.url + fragment, width, dark)
        page.wait_for(
            "document.querySelectorAll('figure').length > 0 && !document.getElementById('quantization').hidden"
        )
        return page

    return start


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_every_text_can_be_read(rich, dark, wrong):
    page = rich(dark=dark, wrong=wrong)
    page.click("summary")
    page.evaluate(f"document.querySelector('{canvas('gate_mean')}').focus()")
    page.press("ArrowDown")  # the tip, too
    found = page.evaluate(CONTRAST)
    assert found["poor"] == []
    assert found["seen"] > 300
    assert page.errors == []


def test_a_text_that_cannot_be_read_is_noticed(rich):
    page = rich()
    page.evaluate("document.documentElement.style.setProperty('--muted', '#999')")
    assert len(page.evaluate(CONTRAST)["poor"]) > 5


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_can_be_chosen_and_stays(rich, dark):
    page = rich(dark=dark)
    colour = "getComputedStyle(document.body).backgroundColor"
    light, night = "rgb(245, 246, 248)", "rgb(14, 17, 22)"
    assert page.evaluate(colour) == (night if dark else light)
    other = "light" if dark else "dark"
    choose(page, "theme", other)
    assert page.evaluate(colour) == (light if dark else night)
    assert page.evaluate(CONTRAST)["poor"] == []
    page.open(page.evaluate("location.href"), dark=dark)
    page.wait_for(f"document.getElementById('theme').value === '{other}'")
    assert page.evaluate(colour) == (light if dark else night)
    choose(page, "theme", "auto")
    assert page.evaluate(colour) == (night if dark else light)
    assert page.errors == []


def test_everything_has_a_name_and_a_role(rich):
    page = rich(wrong=True)
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("[...document.querySelectorAll('h1, h2')].map(h => h.tagName)") == ["H1"] + ["H2"] * 5
    outside = "[...document.body.children].filter(e => !['HEADER', 'MAIN', 'FOOTER'].includes(e.tagName)).length"
    assert page.evaluate(outside) == 0
    landmarks = page.evaluate(
        "[...document.querySelectorAll('section, [role=region]')].map(e => e.ariaLabel"
        " || document.getElementById(e.getAttribute('aria-labelledby')).innerText)"
    )
    assert len(landmarks) == len(set(landmarks)) == 9
    roles = page.evaluate("[...document.querySelectorAll('canvas')].map(c => [c.getAttribute('role'), c.tabIndex])")
    assert roles == [["application", 0]] * 4
    described = "document.getElementById(document.querySelector('canvas').getAttribute('aria-describedby')).innerText"
    assert "arrow keys" in page.evaluate(described)
    assert page.evaluate("document.querySelector('canvas').getAttribute('aria-roledescription')") == "heat map"
    assert page.evaluate("document.getElementById('status').getAttribute('role')") == "status"
    identities = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(identities) == len(set(identities))
    assert (
        page.evaluate("document.querySelectorAll('thead th:not([scope=col]), tbody th:not([scope=row])').length") == 0
    )
    page.evaluate("document.querySelector('canvas').removeAttribute('aria-label')")
    page.evaluate("document.getElementById('tableBox').removeAttribute('aria-label')")
    page.evaluate("document.getElementById('pause').textContent = ''")
    assert len(page.evaluate(NAMELESS)) >= 2


def test_the_keyboard_alone_reaches_and_works_everything(rich):
    page = rich()
    reached: list[str] = []
    for _ in range(24):
        page.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.id || e.value || e.closest('figure')?.dataset.key || e.ariaLabel || e.tagName)"
                "(document.activeElement)"
            )
        )
        outline = page.evaluate(
            "(e => getComputedStyle(e.matches('input') ? e.nextSibling : e).outlineStyle)(document.activeElement)"
        )
        assert outline != "none", reached
        if reached[-1] == "tableBox":
            break
    assert reached == [
        "engine", "900", "pause", "theme", "overview", "format", "activation_max_to_median_ratio",
        "attention_sink_mass", "gate_mean", "quantization_headroom_ratio", "SUMMARY",
        "Layers and positions", "Formats", "tableBox",
    ]  # fmt: skip
    page.evaluate("document.querySelector('input[name=metric]').focus()")
    page.press("ArrowRight")
    page.wait_for("document.querySelectorAll('figure').length === 1")
    assert page.evaluate("document.querySelector('input[name=metric]:checked').value") == "activation_abs_max"
    assert page.evaluate("document.activeElement.value") == "activation_abs_max"
    assert page.errors == []


@pytest.mark.parametrize("fragment", ["", "#show=quantization_headroom_ratio"])
def test_a_phone_needs_no_scrolling_sideways(rich, fragment):
    page = rich(360, wrong=not fragment, fragment=fragment)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('.box, .hidden, .tip')"
        " && e.getBoundingClientRect().right > 361).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input + span')].filter(e => e.checkVisibility()"
        " && e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"
    )
    assert small == []  # WCAG 2.2, 2.5.8
    left, top = page.evaluate(
        "(() => { const c = document.querySelector('canvas'); c.scrollIntoView({block: 'center'});"
        " const r = c.getBoundingClientRect(); return [r.x + r.width * 0.9, r.y + 5]; })()"
    )
    for kind in ("touchStart", "touchEnd"):
        points = [{"x": left, "y": top}] if kind == "touchStart" else []
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.wait_for("document.querySelectorAll('.tip:not([hidden])').length === 1")
    tip = page.evaluate(
        "(r => [r.left, r.right])(document.querySelector('.tip:not([hidden])').getBoundingClientRect())"
    )
    assert tip[0] >= 0 and tip[1] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.errors == []


@pytest.mark.parametrize("preference", ["reduce", "no-preference"])
def test_nothing_moves_by_itself(rich, preference):
    page = rich()
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": preference}])
    page.click("input[value=attention_sink_mass] + span")
    page.wait_for("document.querySelectorAll('figure').length === 1")
    assert page.evaluate("document.getAnimations().length") == 0
    moving = page.evaluate(
        "[...document.querySelectorAll('*')].map(e => getComputedStyle(e)).filter(s => s.animationName !== 'none'"
        " || parseFloat(s.transitionDuration) > 0 || s.scrollBehavior === 'smooth').length"
    )
    assert moving == 0


def test_an_offence_against_the_policy_is_noticed(browser, serve):
    page = opened(browser, serve([Model(layers=2)], steps=2).url)
    assert page.errors == []
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=color:red>')")
    assert "Content Security Policy" in page.errors[0]


def test_names_from_outside_never_become_html(browser, serve):
    evil = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>&lt;b&gt;"
    made = serve([], 1)
    for engine in ("0", evil):
        values = {
            series("activation_max_to_median_ratio", layer="000"): 3.0,
            series("patch_installed", patch=evil): 1.0,
            series("patch_enabled", patch=evil): 1.0,
            series("patch_last_change_timestamp_seconds", patch=evil): 1.7e9,
            series("probe_errors_total", probe=evil): 1.0,
            series("massive_activations_total", layer="000", position=evil): 1.0,
            series("tokens_observed_total", phase="decode"): 1.0,
            series("generation", rank=evil, kind="applied"): 1.0,
        }
        write(made.folder, info(evil, engine, evil), values)
    made.history.record()
    page = opened(browser, made.url + "#show=" + evil.replace('"', "%22"))
    page.wait_for("document.querySelectorAll('#engine option').length === 2")
    assert text(page, "model") == evil
    assert evil in text(page, "status")
    assert evil in page.evaluate("document.querySelector('.tile').innerText")
    assert evil in page.evaluate("document.querySelector('.run').title")
    page.click("summary")
    page.evaluate("document.querySelector('canvas').focus()")
    page.press("ArrowDown")
    assert evil in page.evaluate("document.getElementById('said').textContent")
    assert page.evaluate("document.querySelectorAll('img, body script, b b').length") == 0
    assert page.evaluate("document.title") == f"{evil} · Sluice"
    assert page.errors == []
