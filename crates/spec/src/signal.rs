//! The signal that asks a container to end.

use gantry_cri_api::v1::Signal;

/// SIGTERM, when neither CRI nor image chooses.
pub const DEFAULT: i32 = 15;

/// First and last real-time signal as libc gives them to programs (signal(7)).
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Numbers of signal(7) for x86, ARM and most other architectures; not those of Alpha, SPARC,
/// MIPS and PA-RISC.
const NUMBERS: [(&str, i32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];

/// The stop signal of a container: CRI's choice, else the image's `StopSignal`, else SIGTERM.
///
/// Text of the image that names no signal is passed over: an error would be worth little here, and
/// at stop it would make the pod immortal.
pub fn stop_signal(cri: Signal, image: &str) -> i32 {
    number(cri).or_else(|| parse(image)).unwrap_or(DEFAULT)
}

/// The number of CRI's signal; `None` for `RUNTIME_DEFAULT`.
pub fn number(signal: Signal) -> Option<i32> {
    if signal == Signal::RuntimeDefault {
        return None;
    }
    let name = signal.as_str_name().strip_prefix("SIG")?;
    // CRI writes SIGRTMINPLUS3 where everybody else writes SIGRTMIN+3.
    if let Some(offset) = name.strip_prefix("RTMINPLUS") {
        return real_time(RTMIN, offset, 1);
    }
    if let Some(offset) = name.strip_prefix("RTMAXMINUS") {
        return real_time(RTMAX, offset, -1);
    }
    parse(name)
}

/// CRI's name of a number, for container status; `RuntimeDefault` when it has none.
pub fn from_number(signal: i32) -> Signal {
    // Of two names for one number the first in CRI's order would be the less usual one.
    let usual = match signal {
        17 => Some(Signal::Sigchld),
        29 => Some(Signal::Sigio),
        6 => Some(Signal::Sigabrt),
        _ => None,
    };
    let all = (1..=i32::from(u8::MAX)).map_while(|value| Signal::try_from(value).ok());
    usual
        .or_else(|| {
            all.into_iter()
                .find(|candidate| number(*candidate) == Some(signal))
        })
        .unwrap_or(Signal::RuntimeDefault)
}

/// Parses a signal as images write it: `SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
pub fn parse(text: &str) -> Option<i32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text
            .parse()
            .ok()
            .filter(|signal| (1..=RTMAX).contains(signal));
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    match name {
        "RTMIN" => return Some(RTMIN),
        "RTMAX" => return Some(RTMAX),
        _ => {}
    }
    if let Some(offset) = name.strip_prefix("RTMIN+") {
        return real_time(RTMIN, offset, 1);
    }
    if let Some(offset) = name.strip_prefix("RTMAX-") {
        return real_time(RTMAX, offset, -1);
    }
    NUMBERS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

fn real_time(base: i32, offset: &str, sign: i32) -> Option<i32> {
    if !offset.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let offset: i32 = offset
        .parse()
        .ok()
        .filter(|offset| *offset <= RTMAX - RTMIN)?;
    Some(base + sign * offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_write_signals_in_many_ways() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("SigQuit", 3),
            ("15", 15),
            ("64", 64),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMIN+30", 64),
            ("SIGRTMAX-14", 50),
            ("SIGIOT", 6),
        ] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
    }

    #[test]
    fn junk_is_no_signal_and_falls_back_to_term() {
        for junk in [
            "",
            "0",
            "65",
            "-9",
            "SIGSIGTERM",
            "SIGRTMIN+31",
            "RTMIN+",
            "RTMIN+-1",
            "SIGRTMAX-99",
            "99999999999",
            "TERM\n",
            "१५",
        ] {
            assert_eq!(parse(junk), None, "{junk:?}");
            assert_eq!(stop_signal(Signal::RuntimeDefault, junk), 15, "{junk:?}");
        }
    }

    #[test]
    fn cri_goes_before_the_image() {
        assert_eq!(stop_signal(Signal::Sigusr1, "SIGQUIT"), 10);
        assert_eq!(stop_signal(Signal::RuntimeDefault, "SIGQUIT"), 3);
        assert_eq!(stop_signal(Signal::Sigrtminplus15, ""), 49);
        assert_eq!(stop_signal(Signal::Sigrtmaxminus1, ""), 63);
    }

    #[test]
    fn every_signal_of_cri_has_a_number_and_finds_back() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            let number = number(signal).unwrap_or_else(|| panic!("{signal:?}"));
            let back = from_number(number);
            assert_eq!(super::number(back), Some(number), "{signal:?}");
        }
        assert_eq!(from_number(17), Signal::Sigchld);
        assert_eq!(from_number(32), Signal::RuntimeDefault);
    }
}
