//! `testkit-image NAME OUT.tar`: writes the busybox image under a name as a docker archive.

use std::fs::File;
use std::io::BufWriter;
use std::process::ExitCode;

use gantry_testkit::image::{docker_files, write_tar};
use gantry_testkit::image_busybox::busybox;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, out] = arguments.as_slice() else {
        eprintln!("usage: testkit-image NAME OUT.tar");
        return ExitCode::from(2);
    };
    let written = busybox().and_then(|image| {
        let out = BufWriter::new(File::create(out)?);
        write_tar(&docker_files(&[(&image, &[name])], true), out)
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testkit-image: {out}: {error}");
            ExitCode::FAILURE
        }
    }
}
