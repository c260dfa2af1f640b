// What is wrong with a page as it is laid out now: [problems], and the titles of its pictures.
const done = arguments[arguments.length - 1];
const problems = [];
const root = document.documentElement;
if (root.scrollWidth > root.clientWidth) {
  problems.push(`scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}`);
}
if (performance.getEntriesByType("resource").some((entry) => !entry.name.startsWith("data:"))) {
  problems.push("fetches something");
}

const EDGE = 1; // pixels that boxes may share: rounding
function shrunk(rect, vertical) {
  return {
    left: rect.left + EDGE, right: rect.right - EDGE,
    top: rect.top + EDGE + vertical, bottom: rect.bottom - EDGE - vertical,
  };
}
function meet(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}
function clipped(rect, element) {
  const around = element.closest(".scroll");
  if (!around) return rect;
  const view = around.getBoundingClientRect();
  return { left: Math.max(rect.left, view.left), right: Math.min(rect.right, view.right),
    top: rect.top, bottom: rect.bottom };
}

// Lines of text outside of pictures, each a box; pictures; labels in pictures.
const lines = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.data.trim() || node.parentElement.closest("svg, style, script")) continue;
  if (!node.parentElement.checkVisibility()) continue; // in a closed table
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const rect of range.getClientRects()) {
    const box = shrunk(clipped(rect, node.parentElement), 0);
    if (box.right > box.left) lines.push({ box, text: node.data.trim().slice(0, 40) });
  }
}
const pictures = [];
const words = (label) => label.textContent.replace(/\s+/g, "");
for (const svg of document.querySelectorAll("figure svg")) {
  const title = svg.getAttribute("aria-label");
  const rect = svg.getBoundingClientRect();
  pictures.push(title);
  if (rect.width < 250 || rect.height < 50) {
    problems.push(`picture ${title}: no size (${rect.width} x ${rect.height})`);
    continue;
  }
  const drawn = [...svg.querySelectorAll("path, image, use")].filter((part) => {
    const box = part.getBoundingClientRect();
    return box.width > 20 || box.height > 20;
  });
  if (!drawn.length) problems.push(`picture ${title}: nothing drawn`);
  lines.push({ box: shrunk(rect, 0), text: `picture ${title}` });
  const labels = [...svg.querySelectorAll("text")].map((label) => {
    const place = label.getBoundingClientRect();
    if (place.left < rect.left - 2 || place.right > rect.right + 2 ||
        place.top < rect.top - 2 || place.bottom > rect.bottom + 2) {
      problems.push(`picture ${title}: ${words(label)} is cut off`);
    }
    return { box: shrunk(place, place.height * 0.1), text: words(label) };
  });
  compare(labels, `picture ${title}: `);
}
compare(lines, "");
function compare(items, where) {
  for (let i = 0; i < items.length; i++) {
    for (let j = i + 1; j < items.length; j++) {
      if (meet(items[i].box, items[j].box)) {
        problems.push(`${where}"${items[i].text}" overlaps "${items[j].text}"`);
      }
    }
  }
}

const images = [...document.querySelectorAll("svg image")].map((image) => {
  const copy = new Image();
  copy.src = image.href.baseVal;
  return copy.decode().catch(() => problems.push("an image does not decode"));
});
Promise.all(images).then(() => done({ problems, pictures }));
