//! The dashboard in a real browser, with real guests behind it: the lesson's chapters about backups, sizes and
//! transient disks, steered by the page's own buttons. `scripts/lib/browser-test` prepares and runs it.

#[path = "browser/driver.rs"]
mod driver;

use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use driver::{Browser, PATIENCE, request};

const PROJECTOR: (u32, u32) = (1920, 1080);
const PHONE: (u32, u32) = (390, 844);
const TAB: char = '\u{e004}';
const ENTER: char = '\u{e007}';

/// The dashboard, seen by a browser and by ourselves.
struct Lesson {
    browser: Browser,
    port: u16,
    token: String,
    /// What a command line begins with that runs where the guests are.
    inside: Vec<String>,
    home: String,
}

#[test]
#[ignore = "scripts/lib/browser-test runs it, with a dashboard and guests"]
fn the_lesson_is_seen_in_a_browser() {
    let lesson = Lesson::begin();
    lesson.a_machine_is_made_and_its_page_is_seen();
    lesson.the_page_is_used_by_keyboard();
    lesson.snapshots_are_taken_while_the_counter_counts();
    lesson.each_kind_has_its_box();
    lesson.rows_are_counted();
    lesson.a_machine_grows_and_shrinks_under_load();
    lesson.memory_is_mapped_and_clones_share_it();
    lesson.what_is_transient_is_gone();
    assert_eq!(lesson.browser.complaints(), Vec::<String>::new());
}

impl Lesson {
    fn begin() -> Lesson {
        let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("{name} is set"));
        let address = variable("CATNAP_DASHBOARD");
        let rest = address.strip_prefix("http://127.0.0.1:").expect("an address on loopback");
        let (port, token) = rest.trim_end_matches('/').split_once('/').expect("a token");
        let browser = Browser::start(
            variable("CATNAP_WEBDRIVER").parse().expect("a port"),
            PathBuf::from(variable("CATNAP_SHOTS")),
        );
        let inside = variable("CATNAP_INSIDE").split_whitespace().map(str::to_owned).collect();
        let (port, token) = (port.parse().expect("a port"), token.to_owned());
        browser.look(PROJECTOR, false);
        browser.open(&address);
        Lesson { browser, port, token, inside, home: variable("CATNAP_HOME") }
    }

    // --- steering ---

    fn get(&self, path: &str) -> Value {
        let answer = request(self.port, "GET", &format!("/{}/{path}", self.token), "", PATIENCE).expect("an answer");
        assert_eq!(answer.0, 200, "{path}: {answer:?}");
        serde_json::from_str(&answer.1).expect("JSON")
    }

    /// Asks a machine's page, by way of the dashboard.
    fn ask(&self, method: &str, name: &str, path: &str, body: &str) -> (u16, Value) {
        let root = self.get(&format!("api/page/{name}"))["root"].as_str().expect("a path").to_owned();
        let path = format!("{root}{path}");
        let (status, text) = request(self.port, method, &path, body, PATIENCE).expect("an answer");
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Runs a command where the guests are.
    fn inside(&self, words: &[&str], input: &str) {
        let mut command = Command::new(&self.inside[0]);
        command.args(&self.inside[1..]).args(words).stdin(Stdio::piped());
        let mut child = command.spawn().expect("a process");
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("all is read");
        assert!(child.wait().expect("an end").success(), "{words:?}");
    }

    fn show(&self, view: &str) {
        self.browser.click(&format!("nav a[href='#{view}']"));
        let shown = "[...document.querySelectorAll('main > section:not([hidden])')].map(s => s.id).join()";
        self.browser.until(&format!("{shown} === '{view}'"));
    }

    /// Pictures of this view, large and small, by day and by night; nothing may stick out on a phone.
    fn picture(&self, view: &str) {
        for (size, name) in [(PROJECTOR, "projector"), (PHONE, "phone")] {
            for (dark, light) in [(false, "light"), (true, "dark")] {
                self.browser.look(size, dark);
                self.browser.run("window.scrollTo(0, 0)");
                // The next event draws it anew.
                sleep(Duration::from_millis(1200));
                self.browser.shot(&format!("{view}-{name}-{light}"));
                let wide = self.browser.of("document.documentElement.scrollWidth").as_u64().expect("a number");
                assert!(wide <= size.0.into(), "{view} is {wide} wide on a {name}");
            }
        }
        self.browser.look(PROJECTOR, false);
    }

    /// Clicks a button with this label, and gives the command line that it shows and its number.
    #[track_caller]
    fn press(&self, label: &str) -> (String, u64) {
        let button = format!(
            "[...document.querySelectorAll('main > section:not([hidden]) .verb')].find(b => b.querySelector('b').textContent === {})",
            json!(label)
        );
        self.browser.until(&format!("!!({button})"));
        let shown = self.browser.run(&format!(
            "document.querySelector('#to-press')?.removeAttribute('id'); const b = {button}; b.id = 'to-press'; return b.querySelector('code').textContent"
        ));
        let before = self.last_job();
        self.browser.click("#to-press");
        let number = self.browser.until(&format!("+document.querySelector('#jobs li')?.dataset.key > {before} && +document.querySelector('#jobs li').dataset.key"));
        let shown = shown.as_str().expect("text").to_owned();
        let ran = self.job(number.as_u64().expect("a number"), "code").to_string();
        assert_eq!(ran.trim_matches('"').trim(), shown.replace('"', "\\\""), "what is shown is what is run");
        (shown, number.as_u64().expect("a number"))
    }

    fn last_job(&self) -> u64 {
        self.browser.of("+(document.querySelector('#jobs li')?.dataset.key ?? 0)").as_u64().expect("a number")
    }

    fn job(&self, number: u64, part: &str) -> Value {
        self.browser.of(&format!("document.querySelector('#jobs li[data-key=\"{number}\"] {part}').textContent"))
    }

    /// Waits until a command line has ended; gives what it said.
    #[track_caller]
    fn ended(&self, number: u64, how: &str) -> String {
        let word = format!("document.querySelector('#jobs li[data-key=\"{number}\"] > span').textContent");
        self.browser.until(&format!("!{word}.startsWith('runs')"));
        let (word, said) = (self.browser.of(&word), self.job(number, "pre"));
        let (word, said) = (word.as_str().expect("text"), said.as_str().expect("text"));
        assert!(word.starts_with(how), "{word}: {said}");
        said.to_owned()
    }

    /// Presses a button and waits until what it runs is done.
    #[track_caller]
    fn does(&self, label: &str) -> String {
        let (_, number) = self.press(label);
        self.ended(number, "done")
    }

    /// Has the page's server run a command line that no button has.
    fn runs(&self, words: &[&str]) -> u64 {
        let body = json!({ "words": words }).to_string();
        let answer =
            request(self.port, "POST", &format!("/{}/api/run", self.token), &body, PATIENCE).expect("an answer");
        assert_eq!(answer.0, 202, "{words:?}: {answer:?}");
        serde_json::from_str::<Value>(&answer.1).expect("JSON")["id"].as_u64().expect("a number")
    }

    fn card(&self, name: &str, part: &str) -> String {
        format!("document.querySelector('#cards li[data-key=\"{name}\"] .{part}')?.textContent")
    }

    fn choose(&self, name: &str) {
        let chip = format!("#choice button[data-key='{name}']");
        self.browser.until(&format!("!!document.querySelector({})", json!(chip)));
        self.browser.click(&chip);
    }

    fn figure(&self, id: &str, name: &str) -> String {
        format!(
            "[...document.querySelectorAll('#{id} > div')].find(d => d.dataset.key === {})?.querySelector('dd').textContent",
            json!(name)
        )
    }

    // --- the chapters ---

    fn a_machine_is_made_and_its_page_is_seen(&self) {
        self.browser.until("document.querySelector('#kitten').textContent.includes('There is no machine yet')");
        self.picture("empty");
        let (line, number) = self.press("A new machine");
        assert!(line.starts_with("catnap run kitten --name anna "), "{line}");
        self.ended(number, "done");
        self.browser.until(&format!("{} === 'running'", self.card("anna", "state")));
        self.browser.until(&format!("parseInt({}) > 2", self.card("anna", "ticks")));
        self.browser.until("!!document.querySelector('#kitten iframe')");
        self.browser.inside_frame("#kitten iframe", || {
            let ticks = "+document.querySelector('#ticks')?.textContent";
            let first = self.browser.until(&format!("!!document.querySelector('svg') && {ticks}"));
            self.browser.until(&format!("{ticks} > {first} + 2"));
            // It knows neither whom it is shown to nor how to steer it.
            assert_eq!(self.browser.of("window.origin"), "null");
            let address = self.browser.of("location.href");
            assert!(!address.as_str().expect("text").contains(&self.token), "{address}");
        });
        self.picture("machines");
    }

    fn the_page_is_used_by_keyboard(&self) {
        self.browser.run("document.activeElement.blur(); window.scrollTo(0, 0)");
        let mut seen = Vec::new();
        for _ in 0..12 {
            self.browser.keys(&[TAB]);
            seen.push(self.browser.of("document.activeElement.textContent"));
            if seen.last().is_some_and(|last| last == "Memory") {
                break;
            }
        }
        assert_eq!(seen.last().expect("something"), "Memory", "{seen:?}");
        self.browser.keys(&[ENTER]);
        self.browser.until("!document.querySelector('#memory').hidden && document.querySelector('nav a[aria-current]').textContent === 'Memory'");
        let nameless = "[...document.querySelectorAll('button, a, [role=img], iframe')].filter(e => !(e.textContent.trim() || e.ariaLabel || e.title)).length";
        self.browser.until("!!document.querySelector('#map').ariaLabel");
        assert_eq!(self.browser.of(nameless), 0);
    }

    /// The guest signs, and is thanked.
    fn sign(&self, message: &str, ring: Option<&str>) -> Value {
        let entry = json!({ "name": "Ben", "message": message, "ring": ring }).to_string();
        let (status, answer) = self.ask("POST", "anna", "api/guestbook", &entry);
        assert_eq!(status, 201, "{answer}");
        answer
    }

    fn snapshots_are_taken_while_the_counter_counts(&self) {
        self.sign("before the snapshots", None);
        self.show("time");
        self.browser.until("!!document.querySelector('#time-chart .line')");
        let ticks = self.figure("time-figures", "half-seconds counted by the guest");
        let before = self.browser.until(&format!("+{ticks}"));
        let (line, number) = self.press("Take a live snapshot");
        assert_eq!(line, "catnap snapshot create anna@live-1");
        self.ended(number, "done");
        let still = self.browser.until(&self.figure("time-figures", "stood still for the last snapshot"));
        let written = self.browser.until(&self.figure("time-figures", "then written behind its back for"));
        println!("  it stood still for {still}, and was written for {written}");
        assert!(still.as_str().is_some_and(|text| text.ends_with(" ms")), "{still}");
        self.browser.until(&format!("+{ticks} > {before}"));
        self.browser.until(
            "!!document.querySelector('#time-chart .pause') && !!document.querySelector('#time-chart .writing')",
        );
        let label = self.browser.of("document.querySelector('#time-chart svg').getAttribute('aria-label')");
        assert!(label.as_str().expect("text").contains("held it still for"), "{label}");
        self.does("Take a crash snapshot");
        self.does("Take a quiesced snapshot");
        // The pauses are milliseconds in a graph of a minute and a half.
        self.browser.until("document.querySelectorAll('#time-chart .pause').length === 3");
        self.picture("time");
    }

    /// Clicks a snapshot in the tree: what an expression gives.
    #[track_caller]
    fn pick(&self, button: &str) {
        let digest = self.browser.until(&format!("({button})?.dataset.digest"));
        let selector = format!("#tree [data-digest={digest}]");
        self.browser.click(&selector);
        self.browser.until(&format!("document.querySelector({})?.ariaPressed === 'true'", json!(selector)));
    }

    fn each_kind_has_its_box(&self) {
        self.show("snapshots");
        for (kind, full) in [("live", 4), ("crash", 1), ("quiesced", 1)] {
            let button = format!(
                "[...document.querySelectorAll('#tree button')].find(b => b.querySelector('.kind').className === 'kind {kind}')"
            );
            self.pick(&button);
            self.browser.until(&format!("document.querySelector('#box .kind')?.textContent === '{kind}'"));
            assert_eq!(self.browser.of("document.querySelectorAll('#box .part.full').length"), full, "{kind}");
            assert_eq!(self.browser.of("document.querySelectorAll('#box .part').length"), 5);
            let ephemeral = self.browser.of("[...document.querySelectorAll('#box .part')].at(-1).textContent");
            let ephemeral = ephemeral.as_str().expect("text");
            assert!(ephemeral.contains("not in the box") && ephemeral.contains("/mnt"), "{ephemeral}");
            if kind == "live" {
                self.picture("snapshots");
            }
        }
        let found = self.does("Look for secrets in it");
        assert!(found.contains("private key"), "{found}");
    }

    /// Rings in the middle of a row, and takes snapshots there, as the lesson does: which rows do they have?
    fn rows_are_counted(&self) {
        let mut rows = Vec::new();
        for mode in ["live", "crash", "quiesced"] {
            let name = format!("anna@{mode}-rows");
            let taking = self.runs(&["snapshot", "create", &name, "--mode", mode, "--at-doorbell"]);
            // Until the snapshot waits, rings are answered at once, and there is one row more.
            let begun = Instant::now();
            let acknowledged = loop {
                assert!(begun.elapsed() < PATIENCE, "a ring is awaited");
                let answer = self.sign(mode, Some("unsynced"));
                if answer["awaited"] == true {
                    break answer["id"].as_u64().expect("a number");
                }
            };
            self.browser.until(&format!("!!document.querySelector('#jobs li[data-key=\"{taking}\"]')"));
            self.ended(taking, "done");
            let woken = self.runs(&["restore", &name, "--name", "bella", "-p", "8190:80"]);
            self.browser.until(&format!("!!document.querySelector('#jobs li[data-key=\"{woken}\"]')"));
            self.ended(woken, "done");
            let found = self.settled("bella", mode, acknowledged);
            let torn = if found["integrity"] == "ok" { 0 } else { found["entries"].as_u64().expect("a number") };
            rows.push(json!({ "kind": mode, "acknowledged": acknowledged, "found": found["entries"], "torn": torn }));
            let number = self.runs(&["rm", "--force", "bella"]);
            self.browser.until(&format!("!!document.querySelector('#jobs li[data-key=\"{number}\"]')"));
            self.ended(number, "done");
        }
        println!("  {}", json!(rows));
        let missing = |n: usize| rows[n]["acknowledged"].as_u64() > rows[n]["found"].as_u64();
        assert_eq!([0, 1, 2].map(missing), [false, true, false], "only a power cut loses what was acknowledged");
        let folder = format!("{}/state/lesson", self.home);
        self.inside(&["sh", "-c", &format!("mkdir -p {folder} && cat >{folder}/rows.json")], &json!(rows).to_string());
        self.show("rows");
        self.browser.until("document.querySelectorAll('#rows-table tbody tr').length === 3");
        let shown = self.browser.of(
            "[...document.querySelectorAll('#rows-table tbody tr')].map(tr => [...tr.cells].map(c => c.textContent))",
        );
        for (row, shown) in rows.iter().zip(shown.as_array().expect("a list")) {
            let text = |field: &str| row[field].as_u64().expect("a number").to_string();
            assert_eq!(*shown, json!([row["kind"], text("acknowledged"), text("found"), text("torn")]));
        }
        self.picture("rows");
    }

    /// What a woken guest book has, once its writer has gone on.
    fn settled(&self, name: &str, mode: &str, last: u64) -> Value {
        let begun = Instant::now();
        loop {
            let (status, found) = self.ask("GET", name, "api/guestbook/check", "");
            let there = found["entries"].as_u64().is_some_and(|entries| entries >= last || mode == "crash");
            if status == 200 && there {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{mode}: {found}");
            sleep(Duration::from_millis(200));
        }
    }

    fn a_machine_grows_and_shrinks_under_load(&self) {
        self.show("load");
        self.choose("anna");
        let (_, load) = self.press("Put it under load");
        let rate = self.figure("load-figures", "answers per second");
        self.browser.until(&format!("parseFloat({rate}) > 1"));
        let ticks = self.figure("load-figures", "half-seconds counted, unbroken");
        let before = self.browser.until(&format!("+{ticks}"));
        let (line, number) = self.press("Bigger");
        assert_eq!(line, "catnap resize anna --cpus 2 --memory 512M");
        self.ended(number, "done");
        let cpus = self.figure("load-figures", "vCPUs");
        self.browser.until(&format!("{cpus} === '2'"));
        self.browser.until("document.querySelector('#load-chart').textContent.includes('now 2 vCPUs, 512 MiB')");
        self.browser.until(&format!("+{ticks} > {before} && parseFloat({rate}) > 1"));
        self.picture("load");
        let said = self.ended(load, "done");
        println!("  {}", said.lines().next().unwrap_or_default());
        assert!(said.contains("requests per second"), "{said}");
        let (line, number) = self.press("Smaller");
        assert_eq!(line, "catnap resize anna --cpus 1 --memory 256M");
        self.ended(number, "done");
        self.browser.until(&format!("{cpus} === '1'"));
    }

    fn changed_mib(&self) -> f64 {
        let text = self.browser.until("document.querySelector('#map-legend li[data-key=changed] b')?.textContent");
        let text = text.as_str().expect("text");
        let (number, unit) = text.split_once(' ').expect("a unit");
        let scale = match unit {
            "B" => 1.0 / (1 << 20) as f64,
            "KiB" => 1.0 / 1024.0,
            "MiB" => 1.0,
            _ => 1024.0,
        };
        number.parse::<f64>().expect("a number") * scale
    }

    fn memory_is_mapped_and_clones_share_it(&self) {
        self.show("memory");
        self.choose("anna");
        self.browser
            .until("document.querySelector('#memory-lead').textContent.includes('of anna’s memory. A frame means')");
        let loaded = self.changed_mib();
        self.does("Take a live snapshot");
        let begun = Instant::now();
        while self.changed_mib() >= loaded / 2.0 {
            assert!(begun.elapsed() < PATIENCE, "a snapshot leaves little that changed since");
            sleep(Duration::from_millis(300));
        }
        let fresh = self.changed_mib();
        self.does("Have the guest work");
        let begun = Instant::now();
        while self.changed_mib() <= fresh {
            assert!(begun.elapsed() < PATIENCE, "pages change when the guest works");
            sleep(Duration::from_millis(300));
        }
        println!(
            "  {loaded} MiB had changed, {fresh} MiB after the snapshot, {} MiB after some work",
            self.changed_mib()
        );
        self.show("snapshots");
        let latest = "[...document.querySelectorAll('#tree button')].filter(b => b.querySelector('.kind').className === 'kind live').at(-1)";
        self.pick(latest);
        let said = self.does("Three clones");
        assert!(said.contains("kit-1") && said.contains("kit-3"), "{said}");
        self.show("memory");
        self.choose("kit-1");
        self.browser.until("document.querySelectorAll('#shares .share').length >= 4");
        self.browser.until("parseFloat(document.querySelector('#map-legend li[data-key=shared] b')?.textContent) > 0");
        let share = "document.querySelector('#shares [data-key=kit-2]').textContent";
        let text = self.browser.until(share);
        println!("  {text}");
        assert!(text.as_str().expect("text").contains("shared with others"), "{text}");
        self.picture("memory");
        // Whoever looks at a machine that goes may ask for it once more.
        self.choose("anna");
        for kit in ["kit-1", "kit-2", "kit-3"] {
            let number = self.runs(&["rm", "--force", kit]);
            self.browser.until(&format!("!!document.querySelector('#jobs li[data-key=\"{number}\"]')"));
            self.ended(number, "done");
        }
    }

    /// Two notes, a snapshot, and a monitor that dies: which note is there afterwards?
    fn what_is_transient_is_gone(&self) {
        self.show("machines");
        self.browser.click("#cards li[data-key=anna] button");
        self.does("Write a note on each disk");
        assert_eq!(self.does("Read both notes"), "kept\nlent\n");
        self.show("snapshots");
        self.choose("anna");
        let said = self.does("Take a quiesced snapshot");
        let name = said.lines().find(|line| line.starts_with("anna@")).expect("a name").to_owned();
        self.show("machines");
        let (status, _) = self.ask("GET", "anna", "healthz", "");
        assert_eq!(status, 200);
        let pid = self.pid_of_anna();
        self.inside(&["kill", "-KILL", &pid.to_string()], "");
        self.browser.until(&format!("{} === 'died'", self.card("anna", "state")));
        self.browser.until("document.querySelector('#kitten').textContent.includes('anna does not run: died')");
        self.browser.shot("died");
        self.show("snapshots");
        let button = format!(
            "[...document.querySelectorAll('#tree button')].find(b => b.querySelector('b').textContent === {})",
            json!(name)
        );
        self.pick(&button);
        let (line, number) = self.press("Boot it");
        assert!(line.starts_with(&format!("catnap restore {name} --name anna-2 ")), "{line}");
        self.ended(number, "done");
        self.show("machines");
        self.browser.click("#cards li[data-key=anna-2] button");
        self.browser.until(&format!("{} === 'running'", self.card("anna-2", "state")));
        let (_, number) = self.press("Read both notes");
        let said = self.ended(number, "exit code 1");
        assert!(said.contains("kept\n") && !said.contains("lent"), "{said}");
        self.picture("transient");
    }

    /// The monitor's process of anna.
    fn pid_of_anna(&self) -> u64 {
        let script = "const done = arguments[arguments.length - 1]; const e = new EventSource('api/events');
            e.onmessage = m => { e.close(); done(JSON.parse(m.data).machines.find(m => m.name === 'anna').pid); };";
        self.browser.run_slowly(script).as_u64().expect("a number")
    }
}
