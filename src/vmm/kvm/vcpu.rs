//! vCPU threads: running, leaving the guest on request, parking.
//!
//! `INVARIANT(park-complete)`: a vCPU counts as parked only after KVM_RUN returned EINTR with
//! `immediate_exit` set, which KVM does after it has completed the port or memory access of the exit
//! before. So registers read while parked are those between two instructions.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::libc;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::dirty::DirtyLog;
use super::sys::ExitRequest;
use crate::limits;
use crate::vmm::error::VmmError;
use crate::vmm::exit::ExitVerdict;
use crate::vmm::serial::SerialPort;

const SERIAL_PORT: u16 = 0x3f8;
const SERIAL_PORT_LAST: u16 = SERIAL_PORT + 7;
const DEBUG_EXIT_PORT: u16 = 0xf4;
const I8042_PORT: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// What the threads of one VM share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) gate: Mutex<Gate>,
    pub(super) changed: Condvar,
    /// Copy of `Gate::holds` for the run loop.
    stop: AtomicBool,
    pub(super) serial: Mutex<SerialPort>,
    pub(super) dirty: Mutex<DirtyLog>,
    pub(super) vcpus: Vec<Vcpu>,
    threads: Mutex<Vec<Option<JoinHandle<()>>>>,
}

/// One vCPU; its thread holds the lock while it runs.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) fd: Mutex<VcpuFd>,
    exit_request: ExitRequest,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd) -> Result<Self, VmmError> {
        let exit_request = ExitRequest::new(&fd).map_err(VmmError::local("map the run page of a vCPU"))?;
        Ok(Self { fd: Mutex::new(fd), exit_request })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why vCPUs may or may not run.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) paused: bool,
    pub(super) throttle_percent: u8,
    throttled: bool,
    pub(super) quit: bool,
    pub(super) ended: Option<ExitVerdict>,
    parked: Vec<bool>,
}

impl Gate {
    pub(super) fn new(vcpus: usize) -> Self {
        Self { paused: true, throttle_percent: 0, throttled: false, quit: false, ended: None, parked: vec![true; vcpus] }
    }

    fn holds(&self) -> bool {
        self.paused || self.throttled || self.quit || self.ended.is_some()
    }

    fn running(&self) -> usize {
        self.parked.iter().filter(|parked| !**parked).count()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Shared {
    pub(super) fn new(vcpus: Vec<Vcpu>, serial: SerialPort, dirty: DirtyLog) -> Self {
        Self {
            gate: Mutex::new(Gate::new(vcpus.len())),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            serial: Mutex::new(serial),
            dirty: Mutex::new(dirty),
            threads: Mutex::new(vcpus.iter().map(|_| None).collect()),
            vcpus,
        }
    }

    /// Starts the threads, parked.
    pub(super) fn spawn(self: &Arc<Self>) -> Result<(), VmmError> {
        // WHY a handler that does nothing: the signal only has to end KVM_RUN; without a handler it would end the process.
        register_signal_handler(SIGRTMIN(), on_kick).map_err(VmmError::kvm("sigaction"))?;
        for index in 0..self.vcpus.len() {
            let shared = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .spawn(move || shared.vcpu_thread(index))
                .map_err(VmmError::local("start a vCPU thread"))?;
            if let Some(place) = lock(&self.threads).get_mut(index) {
                *place = Some(thread);
            }
        }
        self.spawn_helper("throttle", Self::throttle_thread)?;
        if lock(&self.dirty).uses_rings() {
            self.spawn_helper("dirty-rings", Self::collect_thread)?;
        }
        Ok(())
    }

    fn spawn_helper(self: &Arc<Self>, name: &str, body: fn(&Self)) -> Result<(), VmmError> {
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || body(&shared));
        lock(&self.threads).push(Some(thread.map_err(VmmError::local("start a helper thread"))?));
        Ok(())
    }

    /// Empties the rings before vCPUs have to stop for them.
    fn collect_thread(&self) {
        loop {
            self.sleep(limits::DIRTY_RING_PERIOD);
            {
                let gate = lock(&self.gate);
                if gate.quit || gate.ended.is_some() {
                    return;
                }
            }
            let mut dirty = lock(&self.dirty);
            if dirty.needs_collecting()
                && let Err(error) = dirty.collect_rings()
            {
                drop(dirty);
                self.update(|gate| {
                    gate.ended.get_or_insert(ExitVerdict::Failed(format!("dirty rings: {error}")));
                });
            }
        }
    }

    /// Changes the gate and tells everybody: vCPUs that may not run any more are thrown out of the guest.
    pub(super) fn update(&self, change: impl FnOnce(&mut Gate)) {
        let holds = {
            let mut gate = lock(&self.gate);
            change(&mut gate);
            let holds = gate.holds();
            self.stop.store(holds, Ordering::SeqCst);
            holds
        };
        self.changed.notify_all();
        if holds {
            self.kick();
        }
    }

    fn kick(&self) {
        let threads = lock(&self.threads);
        for (vcpu, thread) in self.vcpus.iter().zip(threads.iter()) {
            vcpu.exit_request.set(true);
            if let Some(thread) = thread {
                // WHY ignored: the thread may have ended; then it is parked.
                let _ = thread.kill(SIGRTMIN());
            }
        }
    }

    /// Waits until every vCPU is parked.
    pub(super) fn wait_parked(&self) -> Result<(), VmmError> {
        let begun = Instant::now();
        let mut gate = lock(&self.gate);
        while gate.running() > 0 {
            if begun.elapsed() > limits::PARK_WAIT_MAX {
                return Err(VmmError::StuckVcpus { running: gate.running(), milliseconds: begun.elapsed().as_millis() });
            }
            let (next, timeout) = self.changed.wait_timeout(gate, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner);
            gate = next;
            if timeout.timed_out() && gate.running() > 0 {
                drop(gate);
                self.kick();
                gate = lock(&self.gate);
            }
        }
        Ok(())
    }

    /// Ends every thread and waits for them. The gate says quit already.
    pub(super) fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads.into_iter().flatten() {
            while !thread.is_finished() {
                self.vcpus.iter().for_each(|vcpu| vcpu.exit_request.set(true));
                let _ = thread.kill(SIGRTMIN());
                self.changed.notify_all();
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }

    fn vcpu_thread(&self, index: usize) {
        let Some(vcpu) = self.vcpus.get(index) else { return };
        loop {
            let mut gate = lock(&self.gate);
            gate.parked[index] = true;
            self.changed.notify_all();
            while gate.holds() {
                if gate.quit || gate.ended.is_some() {
                    return;
                }
                gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
            }
            gate.parked[index] = false;
            drop(gate);
            if let Some(verdict) = self.run(vcpu) {
                self.update(|gate| {
                    gate.ended.get_or_insert(verdict);
                });
            }
        }
    }

    /// Runs the guest until the gate holds (`None`) or the guest ends.
    fn run(&self, vcpu: &Vcpu) -> Option<ExitVerdict> {
        let mut fd = vcpu.lock();
        loop {
            // WHY this order: whoever sets `stop` sets `immediate_exit` after it, so one of the two is seen.
            vcpu.exit_request.set(false);
            if self.stop.load(Ordering::SeqCst) {
                vcpu.exit_request.set(true);
            }
            match fd.run() {
                Ok(exit) => {
                    if let Some(verdict) = self.handle(exit) {
                        return Some(verdict);
                    }
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    if self.stop.load(Ordering::SeqCst) {
                        return None;
                    }
                }
                Err(error) => return Some(ExitVerdict::Failed(format!("KVM_RUN: {}", std::io::Error::from(error)))),
            }
        }
    }

    fn handle(&self, exit: VcpuExit<'_>) -> Option<ExitVerdict> {
        match exit {
            VcpuExit::IoOut(port @ SERIAL_PORT..=SERIAL_PORT_LAST, data) => {
                let mut serial = lock(&self.serial);
                let offset = u8::try_from(port - SERIAL_PORT).unwrap_or(0);
                data.iter().for_each(|byte| serial.write(offset, *byte));
            }
            VcpuExit::IoIn(port @ SERIAL_PORT..=SERIAL_PORT_LAST, data) => {
                let mut serial = lock(&self.serial);
                let offset = u8::try_from(port - SERIAL_PORT).unwrap_or(0);
                data.iter_mut().for_each(|byte| *byte = serial.read(offset));
            }
            VcpuExit::IoOut(DEBUG_EXIT_PORT, data) => {
                let mut code = [0; 4];
                code.iter_mut().zip(data).for_each(|(byte, given)| *byte = *given);
                return Some(ExitVerdict::Code(u32::from_le_bytes(code)));
            }
            VcpuExit::IoOut(I8042_PORT, [I8042_RESET]) => return Some(ExitVerdict::Reset),
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                if let Err(error) = lock(&self.dirty).collect_rings() {
                    return Some(ExitVerdict::Failed(format!("full dirty ring: {error}")));
                }
            }
            VcpuExit::Shutdown => return Some(ExitVerdict::Shutdown),
            VcpuExit::SystemEvent(..) => return Some(ExitVerdict::Reset),
            VcpuExit::FailEntry(reason, _) => {
                return Some(ExitVerdict::Failed(format!("KVM could not enter the guest: reason {reason:#x}")));
            }
            VcpuExit::InternalError => return Some(ExitVerdict::Failed("KVM could not emulate an instruction".to_owned())),
            other => return Some(ExitVerdict::Failed(format!("unexpected exit `{}`", exit_name(&other)))),
        }
        None
    }

    /// Takes `throttle_percent` of each period away from all vCPUs.
    fn throttle_thread(&self) {
        let period = limits::THROTTLE_PERIOD;
        let mut gate = lock(&self.gate);
        loop {
            if gate.quit || gate.ended.is_some() {
                return;
            }
            let share = period * u32::from(gate.throttle_percent) / 100;
            if share.is_zero() || gate.paused {
                gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(gate);
            self.update(|gate| gate.throttled = true);
            self.sleep(share);
            self.update(|gate| gate.throttled = false);
            self.sleep(period.saturating_sub(share));
            gate = lock(&self.gate);
        }
    }

    fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut gate = lock(&self.gate);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if gate.quit || gate.ended.is_some() {
                return;
            }
            gate = self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The exit without what the guest had in hand: it may be anything.
fn exit_name(exit: &VcpuExit<'_>) -> String {
    let text = format!("{exit:?}");
    text.chars().take_while(char::is_ascii_alphanumeric).collect()
}
