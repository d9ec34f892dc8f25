//! Capabilities (capabilities(7)).

use std::io;

use rustix::thread as rt;

/// Gives up every capability of the calling thread in all five sets: what it could not do
/// without them, neither it nor what it executes can ever do again.
pub fn drop_all() -> io::Result<()> {
    rt::clear_ambient_capability_set()?;
    // One by one, because prctl(2) has no other way; the kernel says which is the last.
    for number in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number; unknown ones are refused with EINVAL.
        let result =
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number as libc::c_ulong, 0, 0, 0) };
        if result != 0 {
            match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::EINVAL) => break,
                e => return Err(e),
            }
        }
    }
    let none = rt::CapabilitySet::empty();
    let sets = rt::CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    Ok(rt::set_capabilities(None, sets)?)
}

/// Whether the calling thread may raise resource limits and lower OOM scores.
pub fn has_sys_resource() -> bool {
    rt::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rt::CapabilitySet::SYS_RESOURCE))
}
