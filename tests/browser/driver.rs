//! A browser, driven over WebDriver (W3C): HTTP with JSON, to a ChromeDriver on loopback.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread::{panicking, sleep};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long something may take to show. Guests are emulated, and the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long something that is there may take to be clicked.
const SOON: Duration = Duration::from_secs(20);

/// A browser with one window.
pub struct Browser {
    port: u16,
    session: String,
    shots: PathBuf,
}

impl Browser {
    /// Starts one; screenshots go to `shots`.
    pub fn start(port: u16, shots: PathBuf) -> Browser {
        let options = json!({ "binary": "/usr/bin/chromium", "args": [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
        ] });
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let mut browser = Browser { port, session: String::new(), shots };
        let session = browser.ask("POST", "/session", &wanted);
        browser.session = format!("/session/{}", session["sessionId"].as_str().expect("a session"));
        browser
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        self.try_to_ask(method, path, body).unwrap_or_else(|why| panic!("{method} {path}: {why}"))
    }

    fn try_to_ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, Value> {
        let answer = request(self.port, method, path, &body.to_string(), PATIENCE).expect("ChromeDriver answers");
        let mut value = serde_json::from_str::<Value>(&answer.1).expect("JSON")["value"].take();
        if answer.0 == 200 { Ok(value) } else { Err(value["message"].take()) }
    }

    fn post(&self, path: &str, body: Value) -> Value {
        self.ask("POST", &format!("{}{path}", self.session), &body)
    }

    pub fn open(&self, address: &str) {
        self.post("/url", json!({ "url": address }));
    }

    /// Runs the body of a function on the page and gives what it returns.
    pub fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", json!({ "script": script, "args": [] }))
    }

    /// The same for one that calls its last argument with what it gives.
    pub fn run_slowly(&self, script: &str) -> Value {
        self.post("/execute/async", json!({ "script": script, "args": [] }))
    }

    /// What an expression is on the page.
    pub fn of(&self, expression: &str) -> Value {
        self.run(&format!("return {expression}"))
    }

    /// Waits until an expression is true on the page; gives what it is.
    #[track_caller]
    pub fn until(&self, expression: &str) -> Value {
        let begun = Instant::now();
        loop {
            let found = self.of(expression);
            if !matches!(found, Value::Null | Value::Bool(false)) && found != "" && found != 0 {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "never came: {expression}");
            sleep(Duration::from_millis(200));
        }
    }

    /// Clicks what a CSS selector finds, as a person does: it must be seen, and nothing may lie over it.
    /// What is redrawn just then is looked for again.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        let begun = Instant::now();
        while let Err(why) = self.try_to_click(selector) {
            assert!(begun.elapsed() < SOON, "{selector} cannot be clicked: {why}");
            sleep(Duration::from_millis(200));
        }
    }

    fn try_to_click(&self, selector: &str) -> Result<(), Value> {
        self.run(&format!("document.querySelector({})?.scrollIntoView({{ block: 'center' }})", json!(selector)));
        let wanted = json!({ "using": "css selector", "value": selector });
        let found = self.try_to_ask("POST", &format!("{}/element", self.session), &wanted)?;
        let id =
            found.as_object().and_then(|object| object.values().next()).and_then(Value::as_str).expect("an element");
        self.try_to_ask("POST", &format!("{}/element/{id}/click", self.session), &json!({})).map(drop)
    }

    /// Presses and lets go of keys, one after the other.
    pub fn keys(&self, keys: &[char]) {
        let down_and_up =
            |key: &char| [json!({"type": "keyDown", "value": key}), json!({"type": "keyUp", "value": key})];
        let actions: Vec<Value> = keys.iter().flat_map(down_and_up).collect();
        self.post("/actions", json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] }));
    }

    /// Goes into the frame that a selector finds, does something, and comes out again.
    #[track_caller]
    pub fn inside_frame<T>(&self, selector: &str, act: impl FnOnce() -> T) -> T {
        let frame = self.post("/element", json!({ "using": "css selector", "value": selector }));
        self.post("/frame", json!({ "id": frame }));
        let result = act();
        self.post("/frame", json!({ "id": null }));
        result
    }

    /// A window of this size, by day or by night.
    pub fn look(&self, (width, height): (u32, u32), dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", media);
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics);
    }

    fn devtools(&self, command: &str, params: Value) -> Value {
        self.post("/goog/cdp/execute", json!({ "cmd": command, "params": params }))
    }

    /// Keeps a picture of the window.
    pub fn shot(&self, name: &str) {
        let picture = self.devtools("Page.captureScreenshot", json!({ "format": "png" }));
        let bytes = decode(picture["data"].as_str().expect("a picture"));
        std::fs::write(self.shots.join(format!("{name}.png")), bytes).expect("a file");
    }

    /// What the browser complained about since it was last asked.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.post("/se/log", json!({ "type": "browser" }));
        let severe = log.as_array().into_iter().flatten().filter(|entry| entry["level"] == "SEVERE");
        severe.map(|entry| entry["message"].to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            if panicking() {
                let wanted = json!({ "cmd": "Page.captureScreenshot", "params": { "format": "png" } }).to_string();
                let path = format!("{}/goog/cdp/execute", self.session);
                if let Ok((200, text)) = request(self.port, "POST", &path, &wanted, Duration::from_secs(20)) {
                    let picture = serde_json::from_str::<Value>(&text).unwrap_or_default();
                    let bytes = decode(picture["value"]["data"].as_str().unwrap_or_default());
                    let _ = std::fs::write(self.shots.join("failed.png"), bytes);
                }
            }
            let _ = request(self.port, "DELETE", &self.session, "", Duration::from_secs(20));
        }
    }
}

/// One request to a server on loopback; gives status and body.
pub fn request(port: u16, method: &str, path: &str, body: &str, time: Duration) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(time))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut bytes = Vec::new();
    let mut part = [0; 16 << 10];
    loop {
        let count = stream.read(&mut part)?;
        bytes.extend(&part[..count]);
        let text = String::from_utf8_lossy(&bytes);
        // ChromeDriver keeps the connection open whatever it is told.
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_ascii_lowercase();
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            if count == 0 || length.is_some_and(|length| body.len() >= length) {
                let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
                return Ok((status, body.to_owned()));
            }
        } else if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Base64 (RFC 4648), as pictures come.
fn decode(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u32> = text.bytes().filter_map(value).map(u32::from).collect();
    let whole = |chunk: &[u32]| {
        let bits = chunk.iter().fold(0, |bits, digit| bits << 6 | digit) << (6 * (4 - chunk.len()));
        bits.to_be_bytes()[1..chunk.len()].to_vec()
    };
    digits.chunks(4).flat_map(whole).collect()
}

#[test]
fn pictures_are_decoded() {
    assert_eq!(
        [decode("bWlhdQ=="), decode("bWlhdSE="), decode("bWlh"), decode("")],
        [&b"miau"[..], b"miau!", b"mia", b""]
    );
}
