// The search runs in a Worker, and browsers start none for a page opened as a file: there, run its script in a hidden frame
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), {hidden: true}))
    const w = frame.contentWindow, script = frame.contentDocument.createElement("script"), waiting = []
    this.deliver = data => waiting.push(data)
    w.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
    w.importScripts = (...urls) => Promise.all(urls.map(src => new Promise((onload, onerror) =>
      frame.contentDocument.body.append(Object.assign(frame.contentDocument.createElement("script"), {src, onload, onerror})))))
    script.onload = () => {
      this.deliver = data => w.dispatchEvent(new w.MessageEvent("message", {data}))
      waiting.forEach(this.deliver)
    }
    script.src = url
    frame.contentDocument.body.append(script)
  }
  postMessage(data) { this.deliver(data) }
  terminate() {}
}
