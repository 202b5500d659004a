// The page of messages: shows the entries nearest to what is pasted. Rare words count more, and long entries not more than short ones.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("message")
  if (!box) return
  const note = document.getElementById("message-count")
  const best = document.createElement("div")
  note.after(best)

  const words = text => new Set(text.toLowerCase().match(/[a-z_]{2,}/g) || [])
  const entries = [...document.querySelectorAll(".md-content h3")].map(heading => {
    const nodes = [heading]
    for (let next = heading.nextElementSibling; next && !/^H[23]$/.test(next.tagName); next = next.nextElementSibling)
      nodes.push(next)
    const said = nodes.length > 1 ? nodes.slice(0, -1) : nodes // the last paragraph says where it is from
    const calls = [...nodes[nodes.length - 1].querySelectorAll("a")].map(link => link.textContent.split(".").pop())
    return { nodes, words: words(said.map(node => node.textContent).join(" ")), calls: words(calls.join(" ")) }
  })
  const counts = new Map()
  for (const entry of entries) for (const word of new Set([...entry.words, ...entry.calls])) counts.set(word, (counts.get(word) || 0) + 1)
  const worth = word => Math.log(1 + entries.length / counts.get(word))
  for (const entry of entries) entry.size = [...entry.words].reduce((sum, word) => sum + worth(word), 0)

  box.addEventListener("input", () => {
    const asked = words(box.value)
    const near = entries
      .map(entry => {
        const shared = [...asked].filter(word => entry.words.has(word) || entry.calls.has(word)).reduce((sum, word) => sum + worth(word), 0)
        return { entry, score: shared / Math.sqrt(entry.size) }
      })
      .filter(({ score }) => score > 0)
      .sort((one, other) => other.score - one.score)
      .slice(0, 3)
    best.replaceChildren(
      ...near.flatMap(({ entry }) => entry.nodes.map(node => node.cloneNode(true))).map(node => {
        node.removeAttribute("id")
        return node
      }),
    )
    best.className = near.length ? "nearest" : ""
    note.textContent = !box.value.trim() ? "" : near.length ? "The nearest entries:" : "No entry shares a word with this."
  })
})
