// Pages that explain go before the modules that do it: a reader who searches for "clamp" wants notebook 04 first.
var Scorer = {
  score: ([docname, , , , score]) => (docname.startsWith("api/") ? score - 100 : score),
  // the rest as in Sphinx's searchtools.js
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
