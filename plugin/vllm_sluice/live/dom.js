// Elements and texts: what every part of the page uses.

export const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map((e) => [e.id, e]));
export const last = (list) => list?.[list.length - 1];
export const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
export const put = (place, text) => place.textContent !== text && (place.textContent = text);
export const finite = (values) => values.filter((v) => v > 0 && Number.isFinite(v));

// Everything that the server says becomes text nodes and attributes here, never HTML: names come from outside.
export function make(tag, content = "", attributes = {}, style = {}) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  Object.assign(made.style, style); // the policy forbids the attribute, not this
  made.append(...[content].flat());
  return made;
}

// Makes a box's content like the new one and keeps its nodes, so that a refresh takes away neither a selection nor the
// place where a screen reader reads.
export function fill(box, fresh) {
  while (box.childNodes.length > fresh.length) box.lastChild.remove();
  fresh.forEach((node, i) => {
    const old = box.childNodes[i];
    if (!old) box.append(node);
    else if (old.nodeName !== node.nodeName) old.replaceWith(node);
    else if (old.nodeType === Node.TEXT_NODE) old.data !== node.data && (old.data = node.data);
    else {
      for (const { name, value } of node.attributes) {
        if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
      }
      for (const { name } of [...old.attributes]) if (!node.hasAttribute(name)) old.removeAttribute(name);
      if (old.style.cssText !== node.style.cssText) old.style.cssText = node.style.cssText;
      fill(old, [...node.childNodes]);
    }
  });
}

// Shows a box, or in its place why there is nothing to show.
export function explain(box, note, reason) {
  box.hidden = !!reason;
  put(note, reason || "");
  return !!reason;
}

// Texts; null is an absent value.
const present = (text) => (v) => (v == null ? "–" : text(v));
export const number = present((v) => (Math.abs(v) >= 1e7 ? v.toExponential(2) : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : v.toPrecision(4)));
export const exact = present((v) => (Math.abs(v) >= 1e7 ? v.toExponential() : v.toLocaleString("en", { maximumSignificantDigits: 6 })));
export const count = present((v) => v.toLocaleString("en"));
export const share = present((v) => v.toFixed(3));
export const plain = present(String);
export const clock = (time, length = 8) => new Date(time * 1000).toTimeString().slice(0, length);
export const duration = (s) => (s < 9.95 ? `${s.toFixed(1)} s` : s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`);
export const listed = (names, most = 4) => names.slice(0, most).join(", ") + (names[most] == null ? "" : ", …");
