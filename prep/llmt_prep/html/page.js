"use strict";
// Draws every figure in the colours that the style sheet has at the moment, and again when light turns to dark.

const boxes = [...document.querySelectorAll(".plot")].map((box) => {
  const figure = JSON.parse(box.querySelector("script").textContent);
  return { figure, target: box.appendChild(document.createElement("div")) };
});

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function template() {
  const family = getComputedStyle(document.body).fontFamily;
  const title = { font: { size: 13, color: colour("quiet") } };
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), showgrid: true, title };
  const mark = { color: colour("mark"), line: { color: colour("mark") } };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 12.5, color: colour("ink") },
      colorway: [colour("bar"), colour("mark")],
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("quiet"), font: { family, color: colour("ink") }, align: "left" },
      xaxis: axis,
      yaxis: axis,
    },
    data: { bar: [{ marker: { color: colour("bar"), line: { width: 0 } } }], scatter: [{ marker: mark }] },
  };
}

function draw() {
  const common = template();
  for (const { figure, target } of boxes) {
    Plotly.react(target, figure.data, { ...figure.layout, template: common }, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
