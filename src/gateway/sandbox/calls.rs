//! Which system calls a gateway may make from its start on, by seccomp. SECURITY.md gives the reasons.

use std::collections::BTreeMap;

use libc as c;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls that are allowed whatever their arguments.
#[rustfmt::skip]
const ALLOWED: &[c::c_long] = &[
    // Files and directories; Landlock says which.
    c::SYS_openat, c::SYS_close, c::SYS_close_range, c::SYS_read, c::SYS_write, c::SYS_readv, c::SYS_writev, c::SYS_pread64,
    c::SYS_pwrite64, c::SYS_preadv, c::SYS_pwritev, c::SYS_preadv2, c::SYS_pwritev2, c::SYS_lseek, c::SYS_fstat, c::SYS_newfstatat,
    c::SYS_statx, c::SYS_statfs, c::SYS_fstatfs, c::SYS_faccessat, c::SYS_faccessat2, c::SYS_readlinkat, c::SYS_getdents64,
    c::SYS_getcwd, c::SYS_mkdirat, c::SYS_unlinkat, c::SYS_linkat, c::SYS_renameat, c::SYS_renameat2, c::SYS_ftruncate, c::SYS_fallocate,
    c::SYS_fsync, c::SYS_fdatasync, c::SYS_sync_file_range, c::SYS_fadvise64, c::SYS_fchmod, c::SYS_fchmodat, c::SYS_flock,
    c::SYS_fcntl, c::SYS_dup, c::SYS_dup3, c::SYS_copy_file_range, c::SYS_sendfile, c::SYS_umask, c::SYS_memfd_create,
    // Sockets that are there; which can be made is said below.
    c::SYS_bind, c::SYS_connect, c::SYS_listen, c::SYS_accept4, c::SYS_getsockname, c::SYS_getpeername, c::SYS_getsockopt,
    c::SYS_setsockopt, c::SYS_sendto, c::SYS_recvfrom, c::SYS_sendmsg, c::SYS_recvmsg, c::SYS_sendmmsg, c::SYS_recvmmsg,
    c::SYS_shutdown, c::SYS_pipe2,
    // Waiting.
    c::SYS_epoll_create1, c::SYS_epoll_ctl, c::SYS_epoll_pwait, c::SYS_epoll_pwait2, c::SYS_ppoll, c::SYS_pselect6, c::SYS_eventfd2,
    c::SYS_timerfd_create, c::SYS_timerfd_settime, c::SYS_nanosleep, c::SYS_clock_nanosleep, c::SYS_clock_gettime,
    c::SYS_clock_getres, c::SYS_gettimeofday, c::SYS_futex, c::SYS_futex_waitv, c::SYS_sched_yield, c::SYS_restart_syscall,
    // Memory; what is executable is said below.
    c::SYS_munmap, c::SYS_mremap, c::SYS_madvise, c::SYS_brk, c::SYS_mincore, c::SYS_msync, c::SYS_mlock, c::SYS_munlock,
    c::SYS_membarrier, c::SYS_getcpu, c::SYS_get_mempolicy, c::SYS_mbind,
    // Threads of this process, and what it is told about itself. `clone3` is answered elsewhere, see `confine`.
    c::SYS_clone3, c::SYS_set_robust_list, c::SYS_rseq, c::SYS_exit, c::SYS_exit_group, c::SYS_sched_getaffinity,
    c::SYS_sched_setaffinity, c::SYS_getpid, c::SYS_gettid, c::SYS_getuid, c::SYS_geteuid, c::SYS_getgid, c::SYS_getegid,
    c::SYS_getrusage, c::SYS_getrandom, c::SYS_uname, c::SYS_sysinfo, c::SYS_rt_sigaction, c::SYS_rt_sigprocmask, c::SYS_rt_sigreturn,
    c::SYS_sigaltstack,
];

/// The older names of some of them, which the C library still uses here.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const OLDER: &[c::c_long] = &[
    c::SYS_open, c::SYS_stat, c::SYS_lstat, c::SYS_access, c::SYS_readlink, c::SYS_mkdir, c::SYS_rmdir, c::SYS_unlink, c::SYS_link, c::SYS_rename,
    c::SYS_chmod, c::SYS_dup2, c::SYS_accept, c::SYS_poll, c::SYS_select, c::SYS_epoll_wait, c::SYS_time, c::SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c::c_long] = &[];

/// Requests of `ioctl`: whether something is a terminal, how much waits, and that a descriptor does not wait.
const IOCTLS: [u64; 4] = [c::TCGETS, c::TIOCGWINSZ, c::FIONREAD, c::FIONBIO];

fn when(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, BackendError> {
    let condition = |(argument, compare, value): &(u8, SeccompCmpOp, u64)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, compare.clone(), *value)
    };
    SeccompRule::new(conditions.iter().map(condition).collect::<Result<_, _>>()?)
}

/// All that of `bits` is set in an argument is `value`.
fn masked(bits: i32) -> SeccompCmpOp {
    SeccompCmpOp::MaskedEq(u64::from(bits.cast_unsigned()))
}

fn word(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}

fn rules(libraries: bool) -> Result<Rules, BackendError> {
    use SeccompCmpOp::Eq;
    let mut rules: Rules = ALLOWED.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    let own = word(std::process::id().cast_signed());
    // Threads, and no processes.
    rules.insert(c::SYS_clone, vec![when(&[(0, masked(c::CLONE_THREAD), word(c::CLONE_THREAD))])?]);
    // Local sockets, and UDP.
    let mut sockets = vec![when(&[(0, Eq, word(c::AF_UNIX))])?];
    for (family, protocol) in [(c::AF_INET, 0), (c::AF_INET, c::IPPROTO_UDP), (c::AF_INET6, 0), (c::AF_INET6, c::IPPROTO_UDP)] {
        sockets.push(when(&[(0, Eq, word(family)), (1, masked(0xf), word(c::SOCK_DGRAM)), (2, Eq, word(protocol))])?);
    }
    rules.insert(c::SYS_socket, sockets);
    rules.insert(c::SYS_socketpair, vec![when(&[(0, Eq, word(c::AF_UNIX))])?]);
    // No memory becomes executable, except that of libraries where some are loaded yet, and that is not written.
    let no = |bits: i32| when(&[(2, masked(bits), 0)]);
    rules.insert(c::SYS_mmap, if libraries { vec![no(c::PROT_EXEC)?, no(c::PROT_WRITE)?] } else { vec![no(c::PROT_EXEC)?] });
    rules.insert(c::SYS_mprotect, vec![no(c::PROT_EXEC)?]);
    // Names of threads and of memory, and whether the process may be looked into.
    let options = [c::PR_SET_NAME, c::PR_GET_NAME, c::PR_SET_VMA, c::PR_GET_DUMPABLE];
    rules.insert(c::SYS_prctl, options.iter().map(|option| when(&[(0, Eq, word(*option))])).collect::<Result<_, _>>()?);
    rules.insert(c::SYS_ioctl, IOCTLS.iter().map(|request| when(&[(1, Eq, *request)])).collect::<Result<_, _>>()?);
    // Limits are read, not set: both halves of the pointer are zero.
    let nothing = SeccompCondition::new(2, SeccompCmpArgLen::Qword, Eq, 0)?;
    rules.insert(c::SYS_prlimit64, vec![SeccompRule::new(vec![nothing])?]);
    // Signals to itself.
    for call in [c::SYS_tgkill, c::SYS_kill] {
        rules.insert(call, vec![when(&[(0, Eq, own)])?]);
    }
    Ok(rules)
}

fn program(rules: Rules, otherwise: SeccompAction, listed: SeccompAction) -> Result<BpfProgram, BackendError> {
    let here = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, listed, here)?.try_into()
}

fn errno(code: i32) -> SeccompAction {
    SeccompAction::Errno(code.cast_unsigned())
}

/// From here on this thread, and all that it starts, make these calls and no others: those fail with `EPERM`. `libraries`: whether the C
/// library loads some of its own yet.
pub(super) fn confine(libraries: bool) -> Result<(), String> {
    // Its flags are in memory, where a filter cannot look. The C library then uses `clone`.
    let clone3 = || program([(c::SYS_clone3, Vec::new())].into(), SeccompAction::Allow, errno(c::ENOSYS));
    apply(|| Ok(vec![clone3()?, program(rules(libraries)?, errno(c::EPERM), SeccompAction::Allow)?]))
}

/// The calls of a process that reads a key, hears, signs and answers.
#[rustfmt::skip]
const HOLDER: &[c::c_long] = &[
    c::SYS_recvfrom, c::SYS_sendto, c::SYS_read, c::SYS_close, c::SYS_fstat, c::SYS_newfstatat, c::SYS_statx, c::SYS_lseek, c::SYS_fcntl,
    c::SYS_munmap, c::SYS_mremap, c::SYS_madvise, c::SYS_brk, c::SYS_futex, c::SYS_getrandom, c::SYS_clock_gettime, c::SYS_sched_yield,
    c::SYS_rt_sigaction, c::SYS_rt_sigprocmask, c::SYS_rt_sigreturn, c::SYS_sigaltstack, c::SYS_restart_syscall, c::SYS_geteuid,
    c::SYS_exit, c::SYS_exit_group,
];

fn holder_rules() -> Result<Rules, BackendError> {
    use SeccompCmpOp::Eq;
    let mut rules: Rules = HOLDER.iter().map(|call| (*call, Vec::new())).collect();
    // Files are read, and nothing is written but last words.
    let writing = c::O_ACCMODE | c::O_CREAT | c::O_TRUNC;
    rules.insert(c::SYS_openat, vec![when(&[(2, masked(writing), 0)])?]);
    rules.insert(c::SYS_write, vec![when(&[(0, Eq, 2)])?]);
    for call in [c::SYS_mmap, c::SYS_mprotect] {
        rules.insert(call, vec![when(&[(2, masked(c::PROT_EXEC), 0)])?]);
    }
    rules.insert(c::SYS_prctl, vec![when(&[(0, Eq, word(c::PR_SET_VMA))])?]);
    Ok(rules)
}

/// From here on a process that holds a key makes the calls of [`HOLDER`] and no others.
pub(super) fn confine_holder() -> Result<(), String> {
    apply(|| Ok(vec![program(holder_rules()?, errno(c::EPERM), SeccompAction::Allow)?]))
}

fn apply(compiled: impl FnOnce() -> Result<Vec<BpfProgram>, BackendError>) -> Result<(), String> {
    let filters = compiled().map_err(|error| error.to_string())?;
    filters.iter().try_for_each(|filter| seccompiler::apply_filter(filter)).map_err(|error| error.to_string())
}
