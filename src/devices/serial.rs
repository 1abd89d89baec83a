//! A 16550A UART (National Semiconductor PC16550D data sheet, section 8): the guest's console.
//!
//! Output leaves at once, so the transmitter is always empty; input waits in a FIFO until the guest reads.

use std::collections::VecDeque;
use std::sync::Arc;

use acpi_tables::aml;
use serde::{Deserialize, Serialize};

use super::{BusDevice, Interrupt};
use crate::acpi;

/// How many ports the registers take.
pub const PORTS: u16 = 8;
/// How much input may wait for the guest. A real chip has 16 bytes and loses the rest; so much spares
/// someone who pastes a page.
pub const INPUT_LIMIT: usize = 4096;

// Register offsets.
const DATA: u64 = 0; // receiver buffer, transmitter holding; divisor's low byte when DLAB is set
const IER: u64 = 1; // interrupt enable; divisor's high byte when DLAB is set
const IIR: u64 = 2; // read: interrupt identification; write: FIFO control
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_THR_EMPTY: u8 = 1 << 1;
const IER_BITS: u8 = 0x0f;
const IIR_NONE: u8 = 0b0001;
const IIR_THR_EMPTY: u8 = 0b0010;
const IIR_RECEIVED: u8 = 0b0100;
const IIR_FIFO: u8 = 0b1100_0000;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_INPUT: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_EMPTY: u8 = 1 << 5 | 1 << 6;
/// Carrier, data set ready, clear to send: somebody is there and listens.
const MSR_READY: u8 = 1 << 7 | 1 << 5 | 1 << 4;

/// The guest-visible registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Whether the FIFOs were switched on.
    pub fifo: bool,
    /// Line control register.
    pub line_control: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Divisor latch; remembered, and of no effect.
    pub divisor: u16,
    /// The transmitter's interrupt is pending: it was enabled or fed, and not yet identified. Not derivable
    /// from the other registers, so losing it would leave a guest that waits to send waiting for ever.
    pub thr_empty_pending: bool,
    /// Input that the guest has not read yet, at most [`INPUT_LIMIT`] bytes.
    pub input: VecDeque<u8>,
}

impl Default for SerialState {
    fn default() -> SerialState {
        SerialState {
            interrupt_enable: 0,
            fifo: false,
            line_control: 0b11, // 8 bits, no parity, one stop bit
            modem_control: 0,
            scratch: 0,
            divisor: 12, // 9600 baud
            thr_empty_pending: false,
            input: VecDeque::new(),
        }
    }
}

/// The chip, its interrupt line, and where its output goes.
pub struct Serial {
    state: SerialState,
    line: Arc<dyn Interrupt>,
    out: Box<dyn FnMut(u8) + Send>,
}

impl Serial {
    /// `out` gets every byte that the guest sends. Refuses a state with more input than fits.
    pub fn new(
        state: SerialState,
        line: Arc<dyn Interrupt>,
        out: Box<dyn FnMut(u8) + Send>,
    ) -> Result<Serial, super::Error> {
        if state.input.len() > INPUT_LIMIT {
            return Err(super::Error::State { device: "serial", what: "input" });
        }
        Ok(Serial { state, line, out })
    }

    /// The state to save.
    pub fn state(&self) -> SerialState {
        self.state.clone()
    }

    /// Types `bytes`; gives back how many found room.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_LIMIT - self.state.input.len());
        self.state.input.extend(&bytes[..taken]);
        self.raise();
        taken
    }

    /// What the interrupt identification register says now, by priority.
    fn pending(&self) -> u8 {
        let enabled = self.state.interrupt_enable;
        if enabled & IER_RECEIVED != 0 && !self.state.input.is_empty() {
            IIR_RECEIVED
        } else if enabled & IER_THR_EMPTY != 0 && self.state.thr_empty_pending {
            IIR_THR_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn raise(&self) {
        if self.pending() != IIR_NONE
            && let Err(error) = self.line.raise()
        {
            tracing::warn!("serial: the interrupt cannot be raised: {error}");
        }
    }

    fn divisor_latch(&self) -> bool {
        self.state.line_control & LCR_DLAB != 0
    }

    fn transmit(&mut self, byte: u8) {
        if self.state.modem_control & MCR_LOOP == 0 {
            (self.out)(byte);
        } else if self.state.input.len() < INPUT_LIMIT {
            self.state.input.push_back(byte);
        }
        self.state.thr_empty_pending = true;
        self.raise();
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let [low, high] = self.state.divisor.to_le_bytes();
        match offset {
            DATA if self.divisor_latch() => low,
            IER if self.divisor_latch() => high,
            DATA => {
                let byte = self.state.input.pop_front().unwrap_or(0);
                self.raise(); // the line is an edge: say again that there is more
                byte
            }
            IER => self.state.interrupt_enable,
            IIR => {
                let pending = self.pending();
                if pending == IIR_THR_EMPTY {
                    self.state.thr_empty_pending = false; // reading IIR takes this one back
                }
                pending | if self.state.fifo { IIR_FIFO } else { 0 }
            }
            LCR => self.state.line_control,
            MCR => self.state.modem_control,
            LSR => LSR_EMPTY | if self.state.input.is_empty() { 0 } else { LSR_DATA_READY },
            // In loopback the modem's inputs are its outputs: OUT2, OUT1, RTS, DTR as DCD, RI, CTS, DSR.
            MSR if self.state.modem_control & MCR_LOOP != 0 => {
                let outputs = self.state.modem_control;
                (outputs & 1) << 5 | (outputs & 2) << 3 | (outputs & 4) << 4 | (outputs & 8) << 4
            }
            MSR => MSR_READY,
            SCR => self.state.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let [low, high] = self.state.divisor.to_le_bytes();
        match offset {
            DATA if self.divisor_latch() => self.state.divisor = u16::from_le_bytes([value, high]),
            IER if self.divisor_latch() => self.state.divisor = u16::from_le_bytes([low, value]),
            DATA => self.transmit(value),
            IER => {
                let newly = value & !self.state.interrupt_enable;
                self.state.interrupt_enable = value & IER_BITS;
                // The transmitter is empty, so enabling its interrupt raises it.
                self.state.thr_empty_pending |= newly & IER_THR_EMPTY != 0;
                self.raise();
            }
            IIR => {
                self.state.fifo = value & FCR_ENABLE != 0;
                if value & FCR_CLEAR_INPUT != 0 {
                    self.state.input.clear();
                }
            }
            LCR => self.state.line_control = value,
            MCR => self.state.modem_control = value & 0x1f,
            SCR => self.state.scratch = value,
            _ => {}
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.read_register(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            self.write_register(offset, *byte);
        }
    }
}

/// Describes the port (PNP0501, a 16550A) at `base_port` with interrupt `gsi`.
pub fn aml(base_port: u16, gsi: u32) -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501"));
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let ports = aml::IO::new(base_port, base_port, 1, PORTS as u8);
    let line = aml::Interrupt::new(true, true, false, false, gsi);
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ports, &line]));
    acpi::bytes(&aml::Device::new("COM1".into(), vec![&hid, &uid, &resources]))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::devices::testing::Counter;

    fn serial(state: SerialState) -> (Serial, Arc<Counter>, Arc<Mutex<Vec<u8>>>) {
        let (line, out) = (Arc::new(Counter::default()), Arc::new(Mutex::new(Vec::new())));
        let sink = out.clone();
        (Serial::new(state, line.clone(), Box::new(move |byte| sink.lock().unwrap().push(byte))).unwrap(), line, out)
    }

    #[test]
    fn output_leaves_at_once_and_asks_for_more_once() {
        let (mut serial, line, out) = serial(SerialState::default());
        serial.write_register(IER, IER_THR_EMPTY);
        assert_eq!(line.count(), 1);
        assert_eq!(serial.read_register(IIR), IIR_THR_EMPTY);
        assert_eq!(serial.read_register(IIR), IIR_NONE);
        serial.write(DATA, b"m");
        assert_eq!((line.count(), out.lock().unwrap().as_slice()), (2, b"m".as_slice()));
    }

    #[test]
    fn a_pending_transmitter_interrupt_survives_a_snapshot() {
        let (mut before, ..) = serial(SerialState::default());
        before.write_register(IER, IER_THR_EMPTY);
        let saved = serde_json::to_vec(&before.state()).unwrap();
        let (mut after, ..) = serial(serde_json::from_slice(&saved).unwrap());
        assert_eq!(after.read_register(IIR), IIR_THR_EMPTY);
    }

    #[test]
    fn input_is_bounded_and_raises_the_line_until_it_is_read() {
        let (mut serial, line, _) = serial(SerialState::default());
        serial.write_register(IER, IER_RECEIVED);
        assert_eq!(serial.input(&[b'x'; INPUT_LIMIT + 1]), INPUT_LIMIT);
        assert_eq!(line.count(), 1);
        assert_eq!(serial.read_register(IIR) & 0xf, IIR_RECEIVED);
        for _ in 0..INPUT_LIMIT {
            assert_eq!(serial.read_register(LSR) & LSR_DATA_READY, LSR_DATA_READY);
            assert_eq!(serial.read_register(DATA), b'x');
        }
        assert_eq!(serial.read_register(LSR) & LSR_DATA_READY, 0);
        assert_eq!(serial.read_register(IIR), IIR_NONE);
        assert_eq!(line.count(), INPUT_LIMIT, "one edge for each byte that was still waiting");
    }

    #[test]
    fn saved_input_beyond_the_limit_is_refused() {
        let input = vec![0; INPUT_LIMIT + 1].into();
        let state = SerialState { input, ..SerialState::default() };
        assert!(Serial::new(state, Arc::new(Counter::default()), Box::new(|_| {})).is_err());
    }

    #[test]
    fn a_driver_finds_a_16550a_by_its_loopback_and_fifo() {
        let (mut serial, _, out) = serial(SerialState::default());
        serial.write_register(MCR, MCR_LOOP | 0b1010);
        assert_eq!(serial.read_register(MSR) & 0xf0, 0b1001_0000);
        serial.write_register(DATA, b'?');
        assert_eq!((serial.read_register(DATA), out.lock().unwrap().len()), (b'?', 0));
        serial.write_register(IIR, FCR_ENABLE);
        assert_eq!(serial.read_register(IIR) & IIR_FIFO, IIR_FIFO);
        serial.write_register(SCR, 0xa5);
        assert_eq!(serial.read_register(SCR), 0xa5);
        serial.write_register(LCR, LCR_DLAB);
        serial.write_register(DATA, 1);
        assert_eq!((serial.read_register(DATA), serial.read_register(IER)), (1, 0));
    }
}
