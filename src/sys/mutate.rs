//! For tests: saved files as somebody hostile would write them. What is drawn depends on the seed alone, so that a
//! failure comes again; `scripts/soak fuzz` asks for more rounds and other seeds.

use serde_json::{Number, Value};

/// Numbers at which something may be off by one, too large, or of another sign.
const EDGES: [u64; 14] =
    [0, 1, 2, 63, 64, 255, 4095, 4096, 0xffff, 1 << 31, u32::MAX as u64, 1 << 63, i64::MAX as u64, u64::MAX];

/// Changes things at random.
pub struct Mutator(u64);

impl Mutator {
    /// One that begins with the seed CATNAP_FUZZ_SEED, or always the same.
    pub fn from_env() -> Mutator {
        let seed = number_from_env("CATNAP_FUZZ_SEED").unwrap_or(1);
        println!("the seed is {seed}");
        Mutator(seed)
    }

    /// A number below `limit` (Knuth's generator, of which the upper bits are good).
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit.max(1)
    }

    /// A number that is one of the edges, near another, or anything.
    fn number(&mut self, now: u64) -> u64 {
        match self.below(4) {
            0 => EDGES[self.below(EDGES.len())],
            1 => now.wrapping_add(self.below(3) as u64).wrapping_sub(1),
            2 => now ^ 1 << self.below(64),
            _ => (self.below(1 << 31) as u64) << self.below(40),
        }
    }

    /// Bytes with a few changes: bits, numbers, pieces that are missing, doubled or swapped.
    pub fn bytes(&mut self, good: &[u8]) -> Vec<u8> {
        let mut bytes = good.to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len());
            let length = self.below(64).min(bytes.len() - at);
            match self.below(5) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 => bytes.truncate(at),
                2 => drop(bytes.drain(at..at + length)),
                3 => {
                    let piece = bytes[at..at + length].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
                _ => {
                    let at = at & !7;
                    if let Some(word) = bytes.get_mut(at..at + 8) {
                        let now = u64::from_le_bytes(word.try_into().expect("8 bytes"));
                        word.copy_from_slice(&self.number(now).to_le_bytes());
                    }
                }
            }
        }
        bytes
    }

    /// A document with a few of its values changed, at any depth.
    pub fn json(&mut self, good: &Value) -> Value {
        let mut value = good.clone();
        for _ in 0..=self.below(3) {
            let count = count(&value);
            let mut at = self.below(count);
            self.change(&mut value, &mut at);
        }
        value
    }

    /// Changes the value that comes `at` places after this one, when it is in it.
    fn change(&mut self, value: &mut Value, at: &mut usize) {
        if *at == 0 {
            *at = usize::MAX;
            return self.change_here(value);
        }
        *at -= 1;
        let inner: Vec<&mut Value> = match value {
            Value::Array(items) => items.iter_mut().collect(),
            Value::Object(fields) => fields.values_mut().collect(),
            _ => return,
        };
        for value in inner {
            if *at == usize::MAX {
                return;
            }
            self.change(value, at);
        }
    }

    fn change_here(&mut self, value: &mut Value) {
        if self.below(16) == 0 {
            *value =
                [Value::Null, Value::Bool(true), "x".into(), Value::Array(vec![]), 7.into()][self.below(5)].clone();
            return;
        }
        match value {
            Value::Null => *value = self.number(0).into(),
            Value::Bool(yes) => *yes = !*yes,
            Value::Number(number) => {
                let now = number.as_u64().unwrap_or(0);
                let then = self.number(now);
                *number = if self.below(8) == 0 { Number::from(then as i64) } else { Number::from(then) };
            }
            Value::String(text) => match self.below(4) {
                0 => text.clear(),
                1 => *text = "../".repeat(self.below(100)) + text,
                2 => *text = text.repeat(1 + self.below(50)),
                _ => *text = String::from_utf8_lossy(&self.bytes(text.as_bytes())).into_owned(),
            },
            Value::Array(items) => {
                let at = self.below(items.len());
                match self.below(3) {
                    0 if !items.is_empty() => drop(items.remove(at)),
                    1 if !items.is_empty() => {
                        let doubled = items[at].clone();
                        let times = self.below(300);
                        items.extend(std::iter::repeat_n(doubled, times));
                    }
                    _ => {
                        let to = self.below(items.len());
                        if !items.is_empty() {
                            items.swap(at, to);
                        }
                    }
                }
            }
            Value::Object(fields) => {
                let key = fields.keys().nth(self.below(fields.len())).cloned();
                match (key, self.below(2)) {
                    (Some(key), 0) => drop(fields.remove(&key)),
                    _ => drop(fields.insert("stranger".into(), 0.into())),
                }
            }
        }
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// How many rounds: CATNAP_FUZZ_ROUNDS, or `usual`.
pub fn rounds(usual: u64) -> u64 {
    number_from_env("CATNAP_FUZZ_ROUNDS").unwrap_or(usual)
}

/// The most memory that this process ever held, in KiB (proc(5), VmHWM).
pub fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn number_from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}
