//! What a process takes of the machine, as proc(5) tells.

use std::fs;
use std::io;

/// Bytes of memory that a process shares with nobody and has written to.
pub fn private_memory(pid: i32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kilobytes = text.lines().filter_map(|line| {
        let rest = line.strip_prefix("Private_Dirty:")?;
        rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    Ok(kilobytes.sum::<u64>() * 1024)
}

/// Threads of a process.
pub fn threads(pid: i32) -> io::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_threads_are_told() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = private_memory(own).unwrap();
        let block = vec![1_u8; 32 << 20];
        assert!(private_memory(own).unwrap() >= before + (24 << 20));
        drop(std::hint::black_box(block));
        assert!(threads(own).unwrap() >= 1);
        assert!(threads(-1).is_err());
    }
}
