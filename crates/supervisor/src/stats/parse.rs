//! What the kernel writes into the files of a cgroup and below /proc. Pure; only the keys that are
//! asked for are looked at, and nothing is allocated for a line.
//!
//! Formats: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of the kernel, accounting/psi.rst,
//! proc(5). What does not look as they say is passed over: a later kernel adds lines and fields.

use super::usage::{Cpu, Device, DeviceIo, Interface, Memory, Pressure, Stall, TaskLimit};

/// Lines of the form `key value`.
fn keyed(text: &[u8]) -> impl Iterator<Item = (&[u8], u64)> {
    lines(text).filter_map(|line| {
        let at = line.iter().position(|&byte| byte == b' ')?;
        Some((&line[..at], number(&line[at + 1..])?))
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&byte| byte == b'\n')
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

/// A file that is one number, or the first of a line; `None` for `max`, and for what is none.
pub fn number(text: &[u8]) -> Option<u64> {
    let word = words(text).next()?;
    word.iter().try_fold(0_u64, |sum, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// A limit in bytes. What v1 writes for none is the largest multiple of a page, which differs
/// between architectures; nothing real is half as large.
pub fn limit(text: &[u8]) -> Option<u64> {
    number(text).filter(|&bytes| bytes < 1 << 62)
}

/// `pids.max`.
pub fn task_limit(text: &[u8]) -> Option<TaskLimit> {
    match words(text).next()? {
        b"max" => Some(TaskLimit::Unlimited),
        word => number(word).map(TaskLimit::At),
    }
}

/// `cpu.max`: the quota, where there is one, and its period, in microseconds.
pub fn cpu_max(text: &[u8]) -> (Option<u64>, Option<u64>) {
    let mut words = words(text).map(number);
    let mut next = || words.next().flatten();
    (next(), next())
}

/// `cpu.weight`, 1 to 10000, as shares of v1, 2 to 262144: what cAdvisor makes of it.
pub fn shares(text: &[u8]) -> Option<u64> {
    let weight = number(text).filter(|weight| (1..=10_000).contains(weight))?;
    Some(2 + (weight - 1) * 262_142 / 9_999)
}

/// `cpu.stat` of v2.
pub fn cpu_v2(text: &[u8]) -> Option<Cpu> {
    let mut cpu = Cpu::default();
    let mut usage = None;
    for (key, value) in keyed(text) {
        let nanos = value.saturating_mul(1000);
        match key {
            b"usage_usec" => usage = Some(nanos),
            b"user_usec" => cpu.user = Some(nanos),
            b"system_usec" => cpu.system = Some(nanos),
            b"nr_periods" => cpu.periods = Some(value),
            b"nr_throttled" => cpu.throttled_periods = Some(value),
            b"throttled_usec" => cpu.throttled = Some(nanos),
            _ => {}
        }
    }
    usage.map(|usage| Cpu { usage, ..cpu })
}

/// `cpuacct.stat`: user and system time in ticks, of which user space always sees 100 a second.
pub fn cpu_times_v1(text: &[u8], cpu: &mut Cpu) {
    const TICK: u64 = 10_000_000;
    for (key, value) in keyed(text) {
        match key {
            b"user" => cpu.user = Some(value.saturating_mul(TICK)),
            b"system" => cpu.system = Some(value.saturating_mul(TICK)),
            _ => {}
        }
    }
}

/// `cpu.stat` of v1: what the bandwidth controller did.
pub fn cpu_throttling_v1(text: &[u8], cpu: &mut Cpu) {
    for (key, value) in keyed(text) {
        match key {
            b"nr_periods" => cpu.periods = Some(value),
            b"nr_throttled" => cpu.throttled_periods = Some(value),
            b"throttled_time" => cpu.throttled = Some(value),
            _ => {}
        }
    }
}

/// `memory.stat` of v2, beside what `memory.current` says.
pub fn memory_v2(usage: u64, text: &[u8]) -> Memory {
    let mut memory = Memory {
        usage,
        ..Memory::default()
    };
    // `kernel` came with Linux 5.18; before, its parts are what there is.
    let (mut kernel, mut parts) = (None, 0_u64);
    for (key, value) in keyed(text) {
        match key {
            b"anon" => memory.rss = value,
            b"file" => memory.cache = value,
            b"file_mapped" => memory.mapped_file = value,
            b"inactive_file" => memory.inactive_file = value,
            b"active_file" => memory.active_file = value,
            b"file_dirty" => memory.dirty = Some(value),
            b"file_writeback" => memory.writeback = Some(value),
            b"pgfault" => memory.page_faults = value,
            b"pgmajfault" => memory.major_page_faults = value,
            b"pgscan" => memory.scanned = Some(value),
            b"pgsteal" => memory.reclaimed = Some(value),
            b"workingset_refault_file" => memory.refaults_file = Some(value),
            b"workingset_refault_anon" => memory.refaults_anon = Some(value),
            b"kernel" => kernel = Some(value),
            b"kernel_stack" | b"pagetables" | b"percpu" | b"slab" => {
                parts = parts.saturating_add(value);
            }
            _ => {}
        }
    }
    memory.kernel = Some(kernel.unwrap_or(parts));
    // The counters of v2 are of the cgroup with all below it.
    memory.own_page_faults = memory.page_faults;
    memory.own_major_page_faults = memory.major_page_faults;
    memory
}

/// `memory.stat` of v1, beside what `memory.usage_in_bytes` says. Of the cgroup with all below it
/// (`total_`), as the usage is. Returns the swap in use too, where the kernel counts it.
pub fn memory_v1(usage: u64, text: &[u8]) -> (Memory, Option<u64>) {
    let mut memory = Memory {
        usage,
        ..Memory::default()
    };
    let mut swap = None;
    for (key, value) in keyed(text) {
        match key {
            b"pgfault" => memory.own_page_faults = value,
            b"pgmajfault" => memory.own_major_page_faults = value,
            b"total_rss" => memory.rss = value,
            b"total_cache" => memory.cache = value,
            b"total_mapped_file" => memory.mapped_file = value,
            b"total_inactive_file" => memory.inactive_file = value,
            b"total_active_file" => memory.active_file = value,
            b"total_dirty" => memory.dirty = Some(value),
            b"total_writeback" => memory.writeback = Some(value),
            b"total_pgfault" => memory.page_faults = value,
            b"total_pgmajfault" => memory.major_page_faults = value,
            b"total_workingset_refault_file" => memory.refaults_file = Some(value),
            b"total_workingset_refault_anon" => memory.refaults_anon = Some(value),
            b"total_swap" => swap = Some(value),
            _ => {}
        }
    }
    (memory, swap)
}

/// One counter of a file of `key value` lines: `memory.events`, `memory.oom_control`,
/// `hugetlb.*.events`.
pub fn counter(text: &[u8], key: &str) -> Option<u64> {
    keyed(text).find_map(|(name, value)| (name == key.as_bytes()).then_some(value))
}

/// `cpu.pressure`, `memory.pressure` and `io.pressure`.
pub fn pressure(text: &[u8]) -> Pressure {
    let mut pressure = Pressure::default();
    for line in lines(text) {
        let mut fields = words(line);
        let kind = fields.next();
        let mut stall = Stall::default();
        for field in fields {
            let Some(at) = field.iter().position(|&byte| byte == b'=') else {
                continue;
            };
            let value = &field[at + 1..];
            match &field[..at] {
                b"avg10" => stall.avg10 = decimal(value),
                b"avg60" => stall.avg60 = decimal(value),
                b"avg300" => stall.avg300 = decimal(value),
                // In microseconds.
                b"total" => stall.total = number(value).unwrap_or_default().saturating_mul(1000),
                _ => {}
            }
        }
        match kind {
            Some(b"some") => pressure.some = Some(stall),
            Some(b"full") => pressure.full = Some(stall),
            _ => {}
        }
    }
    pressure
}

fn decimal(text: &[u8]) -> f64 {
    let text = std::str::from_utf8(text).unwrap_or_default();
    text.parse().unwrap_or_default()
}

fn device(word: &[u8]) -> Option<Device> {
    let at = word.iter().position(|&byte| byte == b':')?;
    Some(Device {
        major: number(&word[..at])?,
        minor: number(&word[at + 1..])?,
    })
}

/// `io.stat` of v2.
pub fn io_v2(text: &[u8]) -> Vec<DeviceIo> {
    let devices = lines(text).filter_map(|line| {
        let mut fields = words(line);
        let mut io = DeviceIo::of(device(fields.next()?)?);
        let mut any = false;
        for field in fields {
            let Some(at) = field.iter().position(|&byte| byte == b'=') else {
                continue;
            };
            let Some(value) = number(&field[at + 1..]) else {
                continue;
            };
            match &field[..at] {
                b"rbytes" => io.read_bytes = value,
                b"wbytes" => io.written_bytes = value,
                b"rios" => io.reads = value,
                b"wios" => io.writes = value,
                _ => continue,
            }
            any = true;
        }
        // The kernel names devices that it has nothing to say of.
        any.then_some(io)
    });
    devices.collect()
}

/// One of `blkio.throttle.io_service_bytes_recursive` and `blkio.throttle.io_serviced_recursive`
/// of v1: `set` is given each device's entry with what was read and written.
pub fn io_v1(
    text: &[u8],
    devices: &mut Vec<DeviceIo>,
    set: impl Fn(&mut DeviceIo, Option<u64>, Option<u64>),
) {
    for line in lines(text) {
        let mut fields = words(line);
        let (Some(device), Some(operation)) = (fields.next().and_then(device), fields.next())
        else {
            continue;
        };
        let Some(value) = fields.next().and_then(number) else {
            continue;
        };
        let at = devices.iter().position(|io| io.device == device);
        let at = at.unwrap_or_else(|| {
            devices.push(DeviceIo::of(device));
            devices.len() - 1
        });
        let Some(io) = devices.get_mut(at) else {
            continue;
        };
        match operation {
            b"Read" => set(io, Some(value), None),
            b"Write" => set(io, None, Some(value)),
            _ => {}
        }
    }
}

/// `/proc/PID/net/dev`: the interfaces of the network namespace of that process but the loopback,
/// whose counters are of nobody's network.
pub fn interfaces(text: &[u8]) -> Vec<Interface> {
    let interfaces = lines(text).filter_map(|line| {
        // The last colon: an alias has one in its name.
        let at = line.iter().rposition(|&byte| byte == b':')?;
        let name = std::str::from_utf8(words(&line[..at]).next()?).ok()?;
        if name == "lo" {
            return None;
        }
        let mut fields = words(&line[at + 1..]).map(number);
        let mut next = || fields.next().flatten();
        let received = [next()?, next()?, next()?, next()?];
        // fifo, frame, compressed, multicast
        for _ in 0..4 {
            next()?;
        }
        let sent = [next()?, next()?, next()?, next()?];
        Some(Interface {
            name: name.to_owned(),
            rx_bytes: received[0],
            rx_packets: received[1],
            rx_errors: received[2],
            rx_dropped: received[3],
            tx_bytes: sent[0],
            tx_packets: sent[1],
            tx_errors: sent[2],
            tx_dropped: sent[3],
        })
    });
    interfaces.collect()
}

/// Pids of `cgroup.procs`. Those of another PID namespace than ours are written as 0.
pub fn pids(text: &[u8]) -> impl Iterator<Item = u64> {
    lines(text).filter_map(number)
}

/// The soft limit of open files in `/proc/PID/limits`; `None` also when there is none.
pub fn open_files_limit(text: &[u8]) -> Option<u64> {
    const KEY: &[u8] = b"Max open files";
    let line = lines(text).find(|line| line.starts_with(KEY))?;
    number(&line[KEY.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_and_weights() {
        assert_eq!(cpu_max(b"50000 100000\n"), (Some(50_000), Some(100_000)));
        assert_eq!(cpu_max(b"max 100000\n"), (None, Some(100_000)));
        assert_eq!(cpu_max(b""), (None, None));
        for (weight, expected) in [
            ("1\n", Some(2)),
            ("100\n", Some(2597)),
            ("10000\n", Some(262_144)),
            ("0\n", None),
            ("10001\n", None),
        ] {
            assert_eq!(shares(weight.as_bytes()), expected, "{weight:?}");
        }
    }

    #[test]
    fn numbers_and_limits() {
        let table: [(&str, Option<u64>); 8] = [
            ("0\n", Some(0)),
            ("4096\n", Some(4096)),
            ("  7 8\n", Some(7)),
            ("max\n", None),
            ("", None),
            ("-1\n", None),
            ("12x\n", None),
            ("99999999999999999999999\n", None),
        ];
        for (text, expected) in table {
            assert_eq!(number(text.as_bytes()), expected, "{text:?}");
        }
        assert_eq!(limit(b"67108864\n"), Some(64 << 20));
        assert_eq!(task_limit(b"max\n"), Some(TaskLimit::Unlimited));
        assert_eq!(task_limit(b"0\n"), Some(TaskLimit::At(0)));
        assert_eq!((task_limit(b""), task_limit(b"many\n")), (None, None));
        assert_eq!(limit(b"9223372036854771712\n"), None, "v1's for none");
        assert_eq!(limit(b"max\n"), None);
    }

    #[test]
    fn cpu_of_v2() {
        let text = b"usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnice_usec 0\n\
            core_sched.force_idle_usec 0\nnr_periods 12\nnr_throttled 3\nthrottled_usec 40000\n\
            nr_bursts 1\nburst_usec 2\n";
        let expected = Cpu {
            usage: 2_500_000_000,
            user: Some(2_000_000_000),
            system: Some(500_000_000),
            periods: Some(12),
            throttled_periods: Some(3),
            throttled: Some(40_000_000),
        };
        assert_eq!(cpu_v2(text), Some(expected));
        // Without the cpu controller there are times alone.
        let cpu = cpu_v2(b"usage_usec 1\nuser_usec 1\nsystem_usec 0\n").unwrap();
        assert_eq!((cpu.usage, cpu.periods), (1000, None));
        assert_eq!(cpu_v2(b""), None);
        assert_eq!(cpu_v2(b"usage_usec\nusage_usec x\n"), None);
    }

    #[test]
    fn cpu_of_v1() {
        let mut cpu = Cpu::default();
        cpu_times_v1(b"user 150\nsystem 50\n", &mut cpu);
        cpu_throttling_v1(
            b"nr_periods 5\nnr_throttled 2\nthrottled_time 77\nwait_sum 9\n",
            &mut cpu,
        );
        assert_eq!(cpu.user, Some(1_500_000_000));
        assert_eq!(cpu.system, Some(500_000_000));
        let throttling = (cpu.periods, cpu.throttled_periods, cpu.throttled);
        assert_eq!(throttling, (Some(5), Some(2), Some(77)));
    }

    #[test]
    fn memory_of_v2() {
        let text =
            b"anon 1000\nfile 5000\nkernel 300\nkernel_stack 200\nslab 50\nfile_mapped 700\n\
            file_dirty 11\nfile_writeback 12\ninactive_anon 1\nactive_anon 999\n\
            inactive_file 2000\nactive_file 2900\nworkingset_refault_anon 3\n\
            workingset_refault_file 4\npgscan 5\npgsteal 6\npgfault 70\npgmajfault 7\n";
        let memory = memory_v2(6300, text);
        assert_eq!(memory.working_set(), 4300);
        assert_eq!((memory.rss, memory.cache), (1000, 5000));
        assert_eq!(memory.kernel, Some(300));
        assert_eq!((memory.page_faults, memory.own_page_faults), (70, 70));
        assert_eq!(memory.major_page_faults, 7);
        assert_eq!((memory.dirty, memory.writeback), (Some(11), Some(12)));
        assert_eq!((memory.scanned, memory.reclaimed), (Some(5), Some(6)));
        // Before Linux 5.18.
        let old = memory_v2(1, b"kernel_stack 200\npagetables 10\nslab 50\n");
        assert_eq!(old.kernel, Some(260));
        // The two files are not of the same moment.
        assert_eq!(memory_v2(100, b"inactive_file 200\n").working_set(), 0);
    }

    #[test]
    fn memory_of_v1_is_that_of_all_below() {
        let text = b"cache 1\nrss 2\npgfault 3\npgmajfault 4\ninactive_file 5\n\
            hierarchical_memory_limit 9223372036854771712\ntotal_cache 100\ntotal_rss 200\n\
            total_mapped_file 30\ntotal_dirty 4\ntotal_writeback 0\ntotal_swap 4096\n\
            total_pgfault 50\ntotal_pgmajfault 6\ntotal_inactive_file 70\ntotal_active_file 25\n";
        let (memory, swap) = memory_v1(400, text);
        assert_eq!(memory.working_set(), 330);
        assert_eq!(
            (memory.rss, memory.cache, memory.mapped_file),
            (200, 100, 30)
        );
        assert_eq!((memory.page_faults, memory.own_page_faults), (50, 3));
        assert_eq!(
            (memory.major_page_faults, memory.own_major_page_faults),
            (6, 4)
        );
        assert_eq!(swap, Some(4096));
        assert_eq!(memory.kernel, None);
        let (_, swap) = memory_v1(1, b"total_rss 1\n");
        assert_eq!(swap, None, "a kernel that does not count swap");
    }

    #[test]
    fn counters_among_others() {
        let events = b"low 0\nhigh 3\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(counter(events, "oom_kill"), Some(1));
        assert_eq!(counter(events, "max"), Some(9));
        assert_eq!(counter(events, "kill"), None);
        let control = b"oom_kill_disable 0\nunder_oom 0\noom_kill 4\n";
        assert_eq!(counter(control, "oom_kill"), Some(4));
    }

    #[test]
    fn stalls() {
        let text = b"some avg10=1.50 avg60=0.25 avg300=0.01 total=1234\n\
            full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let pressure = pressure(text);
        let some = pressure.some.unwrap();
        assert_eq!((some.avg10, some.avg60, some.avg300), (1.5, 0.25, 0.01));
        assert_eq!(some.total, 1_234_000, "nanoseconds");
        assert_eq!(pressure.full.unwrap().total, 7000);
        // cpu.pressure before Linux 5.13.
        let old = super::pressure(b"some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n");
        assert!(old.some.is_some() && old.full.is_none());
        assert_eq!(super::pressure(b""), Pressure::default());
    }

    #[test]
    fn io_of_both_versions() {
        let v2 = b"8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n\
            8:0\n253:1 cost.usage=3\n";
        let read = io_v2(v2);
        assert_eq!(read.len(), 1, "{read:?}");
        let io = &read[0];
        assert_eq!((io.device.major, io.device.minor), (8, 16));
        assert_eq!((io.read_bytes, io.written_bytes), (1_459_200, 314_773_504));
        assert_eq!((io.reads, io.writes), (192, 353));

        let mut devices = Vec::new();
        let bytes = b"8:0 Read 100\n8:0 Write 200\n8:0 Sync 300\n8:0 Total 300\n\
            8:16 Read 5\n8:16 Write 0\nTotal 305\n";
        io_v1(bytes, &mut devices, |io, read, written| {
            io.read_bytes = read.unwrap_or(io.read_bytes);
            io.written_bytes = written.unwrap_or(io.written_bytes);
        });
        io_v1(
            b"8:0 Read 1\n8:0 Write 2\nTotal 3\n",
            &mut devices,
            |io, read, written| {
                io.reads = read.unwrap_or(io.reads);
                io.writes = written.unwrap_or(io.writes);
            },
        );
        assert_eq!(devices.len(), 2);
        assert_eq!(
            (devices[0].read_bytes, devices[0].written_bytes),
            (100, 200)
        );
        assert_eq!((devices[0].reads, devices[0].writes), (1, 2));
        assert_eq!((devices[1].read_bytes, devices[1].reads), (5, 0));
    }

    #[test]
    fn interfaces_but_the_loopback() {
        let text = b"Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 41259717379 2322917    0    0    0     0          0         0 41259717379 2322917    0    0    0     0       0          0
  eth0: 2789744641  117020    1    2    0     0          0         0  7827602   91508    3    4    0     0       0          0
net1.5:12 1 0 0 0 0 0 0 13 2 0 0 0 0 0 0
short: 1 2 3
";
        let read = interfaces(text);
        let names: Vec<_> = read.iter().map(|each| each.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1.5"]);
        let eth0 = &read[0];
        assert_eq!((eth0.rx_bytes, eth0.rx_packets), (2_789_744_641, 117_020));
        assert_eq!((eth0.rx_errors, eth0.rx_dropped), (1, 2));
        assert_eq!((eth0.tx_bytes, eth0.tx_packets), (7_827_602, 91_508));
        assert_eq!((eth0.tx_errors, eth0.tx_dropped), (3, 4));
        assert_eq!((read[1].rx_bytes, read[1].tx_bytes), (12, 13));
    }

    #[test]
    fn processes_and_their_limit() {
        assert_eq!(pids(b"1\n22\n0\n").collect::<Vec<_>>(), [1, 22, 0]);
        assert_eq!(pids(b"").count(), 0);
        let limits =
            b"Limit                     Soft Limit           Hard Limit           Units     \n\
            Max processes             96365                96365                processes \n\
            Max open files            20000                1048576              files     \n";
        assert_eq!(open_files_limit(limits), Some(20000));
        assert_eq!(
            open_files_limit(b"Max open files            unlimited x\n"),
            None
        );
        assert_eq!(open_files_limit(b""), None);
    }
}
