//! Memory that can be given back: the pod's shim must be small when nothing happens.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm;

/// A buffer of whole pages, zeroed, that takes memory only where it was touched and gives it back
/// on [`release`](Self::release).
#[derive(Debug)]
pub struct PageBuffer {
    start: NonNull<u8>,
    len: usize,
}

impl PageBuffer {
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new private anonymous mapping at an address that the kernel chooses touches
        // no memory that exists (mmap(2)).
        let start = unsafe {
            mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                mm::ProtFlags::READ | mm::ProtFlags::WRITE,
                mm::MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// Gives the pages back to the kernel; the content is zeroes afterwards.
    pub fn release(&mut self) {
        // SAFETY: exactly our own mapping, borrowed mutably. MADV_DONTNEED on a private anonymous
        // mapping makes it read as zeroes, which are valid bytes (madvise(2)).
        let result = unsafe {
            mm::madvise(
                self.start.as_ptr().cast(),
                self.len,
                mm::Advice::LinuxDontNeed,
            )
        };
        // Advice: when the kernel will not, nothing but memory is lost.
        let _ = result;
    }
}

impl Deref for PageBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes mapped readable from `start` until drop, always initialised
        // (zeroes), and no one else has the address.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes the borrow the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no borrow of it outlives `self`.
        let result = unsafe { mm::munmap(self.start.as_ptr().cast(), self.len) };
        // Cannot fail for a whole mapping of ours; there is nobody to tell in any case.
        let _ = result;
    }
}

/// What is mapped of the program's file and was never written to: code and constants, which the
/// kernel reads again when they are needed.
#[derive(Clone, Debug, Default)]
pub struct ProgramText {
    ranges: Vec<(usize, usize)>,
}

impl ProgramText {
    /// Reads `/proc/self/smaps`.
    pub fn own() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/self/smaps")?))
    }

    fn parse(smaps: &str) -> Self {
        let mut ranges = Vec::new();
        let mut candidate = None;
        for line in smaps.lines() {
            if let Some(size) = line.strip_prefix("Anonymous:") {
                // A page that was written to (relocated constants) is anonymous: its content is
                // not the file's, and must stay.
                if let (Some(range), "0 kB") = (candidate.take(), size.trim()) {
                    ranges.push(range);
                }
            } else if let Some(range) = mapping(line) {
                candidate = range;
            }
        }
        Self { ranges }
    }

    /// Lets go of the pages. What runs next is mapped again from the page cache, a few pages at a
    /// time; what ran only at the start no longer counts as ours.
    pub fn release(&self) {
        for (start, len) in &self.ranges {
            // SAFETY: the range is a private mapping of a file that cannot be written through and
            // has not been written to, so its pages hold what the file holds: after MADV_DONTNEED
            // an access maps the same content again (madvise(2)), and no value changes.
            let result = unsafe { mm::madvise(*start as *mut _, *len, mm::Advice::LinuxDontNeed) };
            // Advice: when the kernel will not, nothing but memory is lost.
            let _ = result;
        }
    }
}

/// The head line of a mapping in smaps; within it the range, if it is of a file and read-only.
fn mapping(line: &str) -> Option<Option<(usize, usize)>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    let read_only = matches!(fields.next()?, "r--p" | "r-xp");
    let file = fields.nth(3).is_some_and(|path| path.starts_with('/'));
    Some((read_only && file).then_some((start, end - start)))
}

/// Memory of the calling process that it can do without, for [`pause_forever`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Ranges {
    ranges: [(usize, usize); 16],
    stack: (usize, usize),
}

impl Ranges {
    /// Reads `/proc/self/maps` and `smaps`. More ranges than there is room for are left out: they only cost
    /// memory. Refused (`Unsupported`) to a process with more than one thread, whose other
    /// threads would lose their memory too.
    pub fn own() -> io::Result<Self> {
        if std::fs::read_dir("/proc/self/task")?.count() != 1 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let mut found = Self::default();
        let mut count = 0;
        for line in maps.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(mode)) = (fields.next(), fields.next()) else {
                continue;
            };
            let Some((start, end)) = range.split_once('-') else {
                continue;
            };
            let (Ok(start), Ok(end)) = (
                usize::from_str_radix(start, 16),
                usize::from_str_radix(end, 16),
            ) else {
                continue;
            };
            if mode != "rw-p" {
                continue;
            }
            if line.ends_with("[stack]") {
                found.stack = (start, end - start);
            } else if count < found.ranges.len() {
                found.ranges[count] = (start, end - start);
                count += 1;
            }
        }
        for range in ProgramText::own()?.ranges {
            if count < found.ranges.len() {
                found.ranges[count] = range;
                count += 1;
            }
        }
        Ok(found)
    }
}

/// Gives all memory back and sleeps for ever, needing none at all: what is left of the process is
/// a few pages of shared code around the last instruction. Only a signal that cannot be caught ends it; the caller
/// has blocked or ignores the others.
pub fn pause_forever(ranges: Ranges) -> ! {
    for (start, len) in ranges.ranges {
        if len > 0 {
            // SAFETY: MADV_DONTNEED is given only our own private mappings. Code is mapped again
            // from its file when it runs, and pages that were relocated are not among the ranges;
            // writable content reverts to the file's or to zeroes while Rust values live there, so from here on
            // nothing may be used but the code of this function, its arguments on the stack and
            // the system call itself, which is what the rest of this function does. The function
            // never returns.
            unsafe { raw::madvise_dontneed(start, len) };
        }
    }
    let (start, len) = ranges.stack;
    // SAFETY: as above; from here even the stack is gone, and the routine uses registers only.
    unsafe { raw::drop_stack_and_pause(start, len) }
}

#[cfg(target_arch = "x86_64")]
mod raw {
    use std::arch::asm;

    /// madvise(2) without libc, whose errno lives in memory that is being dropped.
    pub unsafe fn madvise_dontneed(start: usize, len: usize) {
        // SAFETY: the caller vouches for the range; the syscall instruction clobbers rcx and r11.
        unsafe {
            asm!("syscall", inlateout("rax") libc::SYS_madvise => _, in("rdi") start,
                in("rsi") len, in("rdx") libc::MADV_DONTNEED as i64,
                lateout("rcx") _, lateout("r11") _);
        }
    }

    pub unsafe fn drop_stack_and_pause(start: usize, len: usize) -> ! {
        // SAFETY: no instruction touches memory after the first system call, and control never
        // leaves the loop.
        unsafe {
            asm!("syscall", "2:", "mov eax, {pause}", "syscall", "jmp 2b",
                pause = const libc::SYS_pause,
                in("rax") libc::SYS_madvise, in("rdi") start, in("rsi") len,
                in("rdx") libc::MADV_DONTNEED as i64, options(noreturn));
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod raw {
    use std::arch::asm;

    /// madvise(2) without libc, whose errno lives in memory that is being dropped.
    pub unsafe fn madvise_dontneed(start: usize, len: usize) {
        // SAFETY: the caller vouches for the range.
        unsafe {
            asm!("svc #0", in("x8") libc::SYS_madvise, inlateout("x0") start => _, in("x1") len,
                in("x2") libc::MADV_DONTNEED as i64);
        }
    }

    pub unsafe fn drop_stack_and_pause(start: usize, len: usize) -> ! {
        // SAFETY: no instruction touches memory after the first system call (ppoll without
        // descriptors, timeout and mask takes null pointers only), and control never leaves.
        unsafe {
            asm!("svc #0", "2:", "mov x0, #0", "mov x1, #0", "mov x2, #0", "mov x3, #0",
                "mov x8, #{ppoll}", "svc #0", "b 2b",
                ppoll = const libc::SYS_ppoll,
                in("x8") libc::SYS_madvise, in("x0") start, in("x1") len,
                in("x2") libc::MADV_DONTNEED as i64, options(noreturn));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_released_buffer_is_empty_and_usable() {
        let mut buffer = PageBuffer::new(64 << 10).unwrap();
        buffer[100] = 7;
        buffer.release();
        assert_eq!(buffer[100], 0);
        buffer[65535] = 1;
        assert_eq!(buffer.len(), 65536);
    }

    #[test]
    fn released_text_runs_on() {
        let text = ProgramText::own().unwrap();
        assert!(!text.ranges.is_empty());
        text.release();
        assert_eq!(ProgramText::own().unwrap().ranges, text.ranges);
    }

    #[test]
    fn only_what_is_the_files_own_is_text() {
        let smaps = "\
00400000-00401000 r--p 00000000 fe:00 1 /bin/x
Anonymous:             0 kB
00401000-0049d000 r-xp 00001000 fe:00 1 /bin/x
Anonymous:             0 kB
004c0000-004c1000 r--p 000c0000 fe:00 1 /bin/x
Anonymous:             4 kB
004c1000-004c3000 rw-p 000c1000 fe:00 1 /bin/x
Anonymous:             0 kB
7ffe00000000-7ffe00002000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
";
        let ranges = ProgramText::parse(smaps).ranges;
        assert_eq!(ranges, [(0x400000, 0x1000), (0x401000, 0x9c000)]);
    }

    #[test]
    fn a_process_with_threads_may_not_drop_their_memory() {
        // The test harness itself has more than one thread.
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || receiver.recv());
            assert_eq!(
                Ranges::own().unwrap_err().kind(),
                io::ErrorKind::Unsupported
            );
            drop(sender);
        });
    }
}
