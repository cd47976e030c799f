(() => {
  "use strict";
  // Filters the cards of every gallery on the page. Without it all cards are shown and the controls stay hidden.
  const start = (gallery) => {
    gallery.dataset.ready = "yes";
    const controls = gallery.querySelector(".dmlr-controls");
    if (!controls) return;
    const field = (name) => controls.querySelector(`[name="${name}"]`);
    const cards = [...gallery.querySelectorAll(".dmlr-card")].map((element) => ({
      element,
      text: element.textContent.toLowerCase(),
      dataset: element.dataset.dataset,
      category: element.dataset.category,
      changes: element.dataset.changes.split("|"), // one per method after the first
    }));
    const value = (name) => field(name)?.value ?? "";
    const change = (card) => card.changes[Number(value("method") || 1) - 1];

    const count = () => {
      for (const option of field("change")?.options ?? []) {
        if (!option.value) continue;
        const found = cards.filter((card) => change(card) === option.value).length;
        option.textContent = `${option.value} (${found})`;
      }
    };
    const filter = () => {
      const words = value("text").toLowerCase().split(/\s+/).filter(Boolean);
      const equal = (name, own) => !value(name) || value(name) === own;
      let shown = 0;
      for (const card of cards) {
        const fits =
          equal("change", change(card)) &&
          equal("dataset", card.dataset) &&
          equal("category", card.category) &&
          words.every((word) => card.text.includes(word));
        card.element.hidden = !fits;
        shown += fits;
      }
      controls.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
      gallery.classList.toggle("dmlr-bare", field("patches")?.checked === false);
      if (value("method")) gallery.dataset.method = value("method");
    };
    const reset = () => {
      for (const select of controls.querySelectorAll("select")) select.selectedIndex = 0;
      field("text").value = "";
      count();
      filter();
      field("text").focus();
    };
    controls.addEventListener("input", () => {
      count();
      filter();
    });
    controls.querySelector("button").addEventListener("click", reset);
    controls.hidden = false;
    count();
    filter();
  };
  document.querySelectorAll(".dmlr-gallery:not([data-ready])").forEach(start);
})();
