// A client of a runtime's streaming server, by the library that kubectl and the kubelet have, for
// tests/bench: it prints one figure a line.
//
//	stream -cri SOCKET -times N exec CONTAINER COMMAND...      milliseconds from the Exec call to the exit code
//	stream -cri SOCKET -times N read CONTAINER COMMAND...      MB/s of a command's standard output
//	stream -cri SOCKET -times N forward POD PORT               MB/s that a forwarded connection sends until its end
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type client struct{ cri.RuntimeServiceClient }

func main() {
	log.SetFlags(0)
	socket := flag.String("cri", "", "socket of the runtime")
	times := flag.Int("times", 1, "how many figures")
	flag.Parse()
	connection, err := grpc.NewClient("unix:"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	c := client{cri.NewRuntimeServiceClient(connection)}
	// The first of anything pays for connections and caches.
	if _, err := c.Version(context.Background(), &cri.VersionRequest{}); err != nil {
		log.Fatal(err)
	}
	args := flag.Args()
	if len(args) < 3 {
		log.Fatal("usage: stream -cri SOCKET [-times N] exec|read|forward ID ...")
	}
	for range *times {
		var figure float64
		switch args[0] {
		case "exec":
			figure, err = c.latency(args[1], args[2:])
		case "read":
			figure, err = c.read(args[1], args[2:])
		case "forward":
			figure, err = c.forward(args[1], args[2])
		default:
			log.Fatalf("no figure %q", args[0])
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(figure)
	}
}

// exec runs a command and gives its output to a writer.
func (c client) exec(container string, command []string, stdout io.Writer) error {
	ctx := context.Background()
	answer, err := c.Exec(ctx, &cri.ExecRequest{ContainerId: container, Cmd: command, Stdout: true})
	if err != nil {
		return err
	}
	location, err := url.Parse(answer.Url)
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: location.Host}, http.MethodPost, location)
	if err != nil {
		return err
	}
	return executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout})
}

func (c client) latency(container string, command []string) (float64, error) {
	start := time.Now()
	err := c.exec(container, command, io.Discard)
	return time.Since(start).Seconds() * 1000, err
}

// counter counts what it is given.
type counter int64

func (n *counter) Write(bytes []byte) (int, error) {
	*n += counter(len(bytes))
	return len(bytes), nil
}

func (c client) read(container string, command []string) (float64, error) {
	var bytes counter
	start := time.Now()
	err := c.exec(container, command, &bytes)
	return float64(bytes) / 1e6 / time.Since(start).Seconds(), err
}

func (c client) forward(pod, port string) (float64, error) {
	number, err := strconv.ParseInt(port, 10, 32)
	if err != nil {
		return 0, err
	}
	answer, err := c.PortForward(context.Background(), &cri.PortForwardRequest{PodSandboxId: pod, Port: []int32{int32(number)}})
	if err != nil {
		return 0, err
	}
	location, err := url.Parse(answer.Url)
	if err != nil {
		return 0, err
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{Host: location.Host})
	if err != nil {
		return 0, err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, location)
	forwarder, err := portforward.New(dialer, []string{":" + port}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case err := <-ended:
		return 0, err
	case <-ready:
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	connection, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
	if err != nil {
		return 0, err
	}
	defer connection.Close()
	bytes, err := io.Copy(io.Discard, connection)
	figure := float64(bytes) / 1e6 / time.Since(start).Seconds()
	if err == nil && bytes == 0 {
		err = fmt.Errorf("nothing came through port %s", port)
	}
	close(stop)
	if ended := <-ended; err == nil {
		err = ended
	}
	return figure, err
}
