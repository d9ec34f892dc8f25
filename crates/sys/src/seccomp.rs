//! A system call filter for a process that only waits (seccomp(2)).

use std::io;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// What a process may still do that was told to wait for ever: say and hear one more word on the
/// descriptors that it has, close them, give memory back, sleep, end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_madvise,
    libc::SYS_munmap,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_pause,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

/// Allows the calling process nothing but to wait; anything else kills it. Needs no_new_privs
/// or CAP_SYS_ADMIN, and cannot be undone.
pub fn only_wait() -> io::Result<()> {
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let ret = libc::BPF_RET | libc::BPF_K;
    let mut program = vec![
        // struct seccomp_data: the architecture is at 4, the number at 0. A foreign architecture
        // has other numbers, so it is checked first.
        instruction(load, 0, 0, 4),
        instruction(equal, 1, 0, AUDIT_ARCH),
        instruction(ret, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        instruction(load, 0, 0, 0),
    ];
    for &number in ALLOWED {
        program.push(instruction(equal, 0, 1, number as u32));
        program.push(instruction(ret, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    program.push(instruction(ret, 0, 0, libc::SECCOMP_RET_KILL_PROCESS));
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `filter` points to `len` instructions that live until the call returns; the kernel
    // copies and checks them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
