//! Kernel structures as bytes and back.

/// A structure of KVM's x86 ABI that is only integers: no padding, no pointer, any bytes are a value.
///
/// # Safety
/// The type is `repr(C)`, has no implicit padding, and every bit pattern is valid.
pub(super) unsafe trait Pod: Copy + Default {}

macro_rules! pod {
    ($($type:ty = $bytes:literal),* $(,)?) => {$(
        const _: () = assert!(size_of::<$type>() == $bytes);
        // SAFETY: integers only, in the order and with the explicit padding of the kernel's ABI; the size is asserted above.
        unsafe impl Pod for $type {}
    )*};
}

pod!(
    kvm_bindings::kvm_regs = 144,
    kvm_bindings::kvm_sregs = 312,
    kvm_bindings::kvm_sregs2 = 320,
    kvm_bindings::kvm_xcrs = 392,
    kvm_bindings::kvm_debugregs = 128,
    kvm_bindings::kvm_lapic_state = 1024,
    kvm_bindings::kvm_vcpu_events = 64,
    kvm_bindings::kvm_mp_state = 4,
    kvm_bindings::kvm_pit_state2 = 112,
    kvm_bindings::kvm_irqchip = 520,
    kvm_bindings::kvm_cpuid_entry2 = 40,
    kvm_bindings::kvm_msr_entry = 16,
);

/// The bytes of `value`.
pub(super) fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` has no padding, so all its bytes are initialised; the slice borrows from `value`.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// The value of exactly `size_of::<T>()` bytes.
pub(super) fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, any bytes are a value of a `Pod`, and the read may be unaligned.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
