// Dark or light: like the system, until the user chooses. Not a module, because it
// must run before the first pixel is drawn.
"use strict";
(() => {
  const KEY = "openmeter-sandbox-theme";
  const root = document.documentElement;
  // A browser may refuse to store the choice; it then applies to this page only.
  const recall = () => { try { return localStorage.getItem(KEY) ?? ""; } catch { return ""; } };
  const remember = (theme) => { try { localStorage.setItem(KEY, theme); } catch { /* as above */ } };
  const changed = () => document.dispatchEvent(new Event("themechange"));
  const apply = (theme) => {
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };

  apply(recall());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  document.addEventListener("DOMContentLoaded", () => {
    const choice = document.getElementById("theme");
    choice.value = root.dataset.theme ?? "";
    choice.addEventListener("change", () => {
      remember(choice.value);
      apply(choice.value);
      changed();
    });
  });
})();
