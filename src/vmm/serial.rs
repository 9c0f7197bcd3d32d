//! The serial console: a 16550 and what becomes of the guest's output.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::config::{ConsoleBuffer, SerialSink};
use super::error::VmmError;
use crate::limits;

/// Pulses the interrupt line of the port.
pub(super) type Pulse = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

#[derive(Clone)]
struct IrqLine {
    pulse: Pulse,
    muted: Arc<AtomicBool>,
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        if self.muted.load(Ordering::Relaxed) { Ok(()) } else { (self.pulse)() }
    }
}

/// The device and its console.
pub(super) struct SerialPort {
    device: Option<Serial<IrqLine, NoEvents, Console>>,
    irq: IrqLine,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialPort")
    }
}

/// Everything about the serial port that moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SerialSnapshot {
    pub(super) registers: [u8; 9],
    pub(super) received: Vec<u8>,
    /// The line that the guest has begun and not ended: the destination prints it whole.
    pub(super) line: Vec<u8>,
}

impl SerialPort {
    pub(super) fn new(sink: &SerialSink, pulse: Pulse) -> Result<Self, VmmError> {
        let irq = IrqLine { pulse, muted: Arc::new(AtomicBool::new(false)) };
        let console = Console { line: Vec::new(), last_line: None, output: Output::open(sink)? };
        Ok(Self { device: Some(Serial::new(irq.clone(), console)), irq })
    }

    pub(super) fn write(&mut self, offset: u8, value: u8) {
        if let Some(device) = &mut self.device {
            // WHY ignore: output that cannot be written or an interrupt that the kernel refuses must not stop the guest.
            let _ = device.write(offset, value);
        }
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.device.as_mut().map_or(0xff, |device| device.read(offset))
    }

    pub(super) fn last_line(&self) -> Option<String> {
        self.device.as_ref()?.writer().last_line.clone()
    }

    /// Prints what the guest left unfinished; only when it will not go on anywhere.
    pub(super) fn finish(&mut self) {
        if let Some(device) = &mut self.device {
            device.writer_mut().end_line();
        }
    }

    pub(super) fn snapshot(&self) -> SerialSnapshot {
        let state = self.device.as_ref().map(Serial::state).unwrap_or_default();
        let line = self.device.as_ref().map(|device| device.writer().line.clone()).unwrap_or_default();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        SerialSnapshot { registers, received: state.in_buffer, line }
    }

    /// Takes over a checked snapshot without raising an interrupt.
    pub(super) fn restore(&mut self, snapshot: &SerialSnapshot) {
        let Some(device) = self.device.take() else { return };
        let [low, high, enable, identification, control, status, modem_control, modem_status, scratch] = snapshot.registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: snapshot.received.clone(),
        };
        let mut console = device.into_writer();
        console.line.clone_from(&snapshot.line);
        // WHY muted: `from_state` raises a pending interrupt again, which the guest would see twice.
        self.irq.muted.store(true, Ordering::Relaxed);
        self.device = Serial::from_state(&state, self.irq.clone(), NoEvents, console).ok();
        self.irq.muted.store(false, Ordering::Relaxed);
    }
}

/// Collects lines and hands whole ones to the sink.
#[derive(Debug)]
struct Console {
    line: Vec<u8>,
    last_line: Option<String>,
    output: Output,
}

impl Console {
    fn end_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        self.output.write(&self.line);
        let text = String::from_utf8_lossy(&self.line);
        self.last_line = Some(text.trim_end_matches(['\r', '\n']).to_owned());
        self.line.clear();
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= limits::CONSOLE_LINE_BYTES_MAX {
                self.end_line();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
enum Output {
    Discard,
    File(File),
    Buffer(ConsoleBuffer),
    Stdout(SyncSender<Vec<u8>>),
}

impl Output {
    fn open(sink: &SerialSink) -> Result<Self, VmmError> {
        Ok(match sink {
            SerialSink::Discard => Self::Discard,
            SerialSink::Buffer(buffer) => Self::Buffer(buffer.clone()),
            SerialSink::File(path) => {
                Self::File(OpenOptions::new().create(true).append(true).open(path).map_err(VmmError::local("open the serial log"))?)
            }
            SerialSink::Stdout => Self::Stdout(stdout_writer()?),
        })
    }

    /// Never blocks on a reader: a vCPU that waits for a terminal could not be paused.
    fn write(&mut self, line: &[u8]) {
        match self {
            Self::Discard => {}
            Self::Buffer(buffer) => buffer.append(line),
            // WHY ignored: a full disk under the console log must not stop the guest.
            Self::File(file) => drop(file.write_all(line)),
            Self::Stdout(queue) => match queue.try_send(line.to_vec()) {
                Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
            },
        }
    }
}

fn stdout_writer() -> Result<SyncSender<Vec<u8>>, VmmError> {
    let (queue, lines) = sync_channel::<Vec<u8>>(limits::CONSOLE_QUEUE_LINES_MAX);
    std::thread::Builder::new()
        .name("serial".to_owned())
        .spawn(move || {
            let mut out = io::stdout();
            while let Ok(line) = lines.recv() {
                if out.write_all(&line).and_then(|()| out.flush()).is_err() {
                    return;
                }
            }
        })
        .map_err(VmmError::local("start the console thread"))?;
    Ok(queue)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn port(sink: &SerialSink) -> (SerialPort, Arc<AtomicU32>) {
        let pulses = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&pulses);
        let pulse = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        (SerialPort::new(sink, Arc::new(pulse)).unwrap(), pulses)
    }

    fn print(port: &mut SerialPort, text: &str) {
        text.bytes().for_each(|byte| port.write(0, byte));
    }

    #[test]
    fn a_line_begun_before_a_migration_is_printed_whole_after_it() {
        let (before, after) = (ConsoleBuffer::default(), ConsoleBuffer::default());
        let (mut source, _) = port(&SerialSink::Buffer(before.clone()));
        let (mut destination, _) = port(&SerialSink::Buffer(after.clone()));
        print(&mut source, "beat 1\nbea");
        destination.restore(&source.snapshot());
        print(&mut destination, "t 2\n");
        assert_eq!((before.text().as_str(), after.text().as_str()), ("beat 1\n", "beat 2\n"));
        assert_eq!((source.last_line().unwrap().as_str(), destination.last_line().unwrap().as_str()), ("beat 1", "beat 2"));
    }

    #[test]
    fn registers_survive_and_a_pending_interrupt_is_not_raised_twice() {
        let (mut source, raised) = port(&SerialSink::Discard);
        for (offset, value) in [(3, 0x83), (0, 0x01), (1, 0x02), (3, 0x03), (4, 0x0b), (7, 0x5a), (1, 0x0f)] {
            source.write(offset, value);
        }
        source.write(0, b'x');
        assert_eq!(raised.load(Ordering::Relaxed), 1);
        let (mut destination, raised) = port(&SerialSink::Discard);
        destination.restore(&source.snapshot());
        assert_eq!(destination.snapshot(), source.snapshot());
        assert_eq!(raised.load(Ordering::Relaxed), 0);
        assert_eq!((destination.read(7), destination.read(4)), (0x5a, 0x0b));
        destination.read(2);
        destination.write(0, b'y');
        assert_eq!(raised.load(Ordering::Relaxed), 1, "interrupts work again after the restore");
    }

    #[test]
    fn a_guest_that_never_ends_its_line_cannot_fill_memory() {
        let buffer = ConsoleBuffer::default();
        let (mut port, _) = port(&SerialSink::Buffer(buffer.clone()));
        for _ in 0..limits::CONSOLE_BUFFER_BYTES_MAX + 5 * limits::CONSOLE_LINE_BYTES_MAX {
            port.write(0, b'a');
        }
        assert!(port.snapshot().line.len() <= limits::CONSOLE_LINE_BYTES_MAX);
        assert!(buffer.text().len() <= limits::CONSOLE_BUFFER_BYTES_MAX);
    }
}
