// The emergency stop as a Go team would write it: gin, a pgx pool, prepared statements, pipelined in two round trips.
package main

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

var statements = map[string]string{
	"lock_job": `SELECT status FROM jobs WHERE id = $1 FOR UPDATE`,
	"stop_executions": `UPDATE executions SET status = 'failed', completed_at = $2,
		output = COALESCE(output, '{}') || '{"error": "Emergency stop by admin", "emergency_stop": true}'
		WHERE job_id = $1 AND status IN ('pending', 'running', 'processing')`,
	"stop_job": `UPDATE jobs SET status = 'failed', updated_at = $2, metadata = COALESCE(metadata, '{}') || $3 WHERE id = $1`,
	"audit": `INSERT INTO emergency_stops (job_id, previous_status, executions_stopped, reason, stopped_at)
		VALUES ($1, $2, $3, $4, $5)`,
	"notify": `SELECT pg_notify('emergency_stop', $1)`,
}

type stopRequest struct {
	Reason *string `json:"reason" binding:"omitempty,max=1000"`
}

type stopped struct {
	OK                bool    `json:"ok"`
	Message           string  `json:"message"`
	JobID             string  `json:"job_id"`
	PreviousStatus    string  `json:"previous_status"`
	NewStatus         string  `json:"new_status"`
	ExecutionsStopped int64   `json:"executions_stopped"`
	StoppedAt         string  `json:"stopped_at"`
	Reason            *string `json:"reason,omitempty"`
}

type alreadyTerminal struct {
	OK      bool   `json:"ok"`
	Message string `json:"message"`
	JobID   string `json:"job_id"`
	Status  string `json:"status"`
	Action  string `json:"action"`
}

type mark struct {
	EmergencyStop bool    `json:"emergency_stop"`
	StoppedAt     string  `json:"stopped_at"`
	StoppedBy     string  `json:"stopped_by"`
	Reason        *string `json:"reason,omitempty"`
}

type logLine struct {
	Time              string  `json:"time"`
	Event             string  `json:"event"`
	Client            string  `json:"client"`
	JobID             string  `json:"job_id"`
	ExecutionsStopped int64   `json:"executions_stopped"`
	DurationMs        float64 `json:"duration_ms"`
	Status            int     `json:"status"`
}

type server struct {
	pool  *pgxpool.Pool
	token []byte
	log   *json.Encoder
}

func (s *server) stopJob(c *gin.Context) {
	started := time.Now()
	line := logLine{Event: "emergency_stop", Client: c.ClientIP(), JobID: c.Param("id")}
	status, body, err := s.answer(c, &line)
	if err != nil {
		log.Print(err)
		status, body = http.StatusInternalServerError, gin.H{"error": "internal error"}
	}
	c.JSON(status, body)
	line.Time = started.UTC().Format("2006-01-02T15:04:05.000Z")
	line.DurationMs, line.Status = float64(time.Since(started).Microseconds())/1000, status
	s.log.Encode(line)
}

func (s *server) answer(c *gin.Context, line *logLine) (int, interface{}, error) {
	if subtle.ConstantTimeCompare([]byte(c.GetHeader("X-Admin-Token")), s.token) != 1 {
		return http.StatusForbidden, gin.H{"error": "forbidden"}, nil
	}
	var request stopRequest
	if c.Request.ContentLength != 0 && c.ShouldBindJSON(&request) != nil {
		return http.StatusBadRequest, gin.H{"error": "body cannot be used"}, nil
	}
	id := c.Param("id")
	ctx := context.Background() // a caller who hangs up does not cancel the stop
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Release() // which ends a connection whose transaction is still open

	// What each round trip sends needs nothing from the answers to its other statements.
	now := time.Now().UTC()
	first := &pgx.Batch{}
	first.Queue("BEGIN")
	first.Queue("lock_job", id)
	first.Queue("stop_executions", id, now)
	results := conn.SendBatch(ctx, first)
	var previous string
	var count pgconn.CommandTag
	_, err = results.Exec()
	if err == nil {
		err = results.QueryRow().Scan(&previous)
	}
	if err == nil {
		count, err = results.Exec()
	}
	if closed := results.Close(); err == nil {
		err = closed
	}
	if err != nil && err != pgx.ErrNoRows {
		return 0, nil, err
	}
	if err == pgx.ErrNoRows || previous == "completed" || previous == "failed" || previous == "cancelled" {
		if _, rollback := conn.Exec(ctx, "ROLLBACK"); rollback != nil {
			return 0, nil, rollback
		}
		if err == pgx.ErrNoRows {
			return http.StatusNotFound, gin.H{"error": "job not found", "job_id": id}, nil
		}
		return http.StatusOK, alreadyTerminal{true, "Job already in terminal state", id, previous, "none"}, nil
	}

	line.ExecutionsStopped = count.RowsAffected()
	stoppedAt := now.Format("2006-01-02T15:04:05Z")
	metadata, _ := json.Marshal(mark{true, stoppedAt, "admin", request.Reason})
	payload, _ := json.Marshal(gin.H{"job_id": id, "stopped_at": stoppedAt, "executions_stopped": line.ExecutionsStopped})
	second := &pgx.Batch{}
	second.Queue("stop_job", id, now, string(metadata))
	second.Queue("audit", id, previous, line.ExecutionsStopped, request.Reason, now)
	second.Queue("notify", string(payload))
	second.Queue("COMMIT")
	if err := conn.SendBatch(ctx, second).Close(); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, stopped{true, "Job emergency stopped", id, previous, "failed", line.ExecutionsStopped, stoppedAt, request.Reason}, nil
}

func main() {
	size, err := strconv.Atoi(os.Getenv("POOL"))
	if err != nil {
		log.Fatal(err)
	}
	config, err := pgxpool.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns, config.MinConns = int32(size), int32(size)
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		for name, query := range statements {
			if _, err := conn.Prepare(ctx, name, query); err != nil {
				return err
			}
		}
		return nil
	}
	pool, err := pgxpool.ConnectConfig(context.Background(), config)
	if err != nil {
		log.Fatal(err)
	}
	s := &server{pool, []byte(os.Getenv("ADMIN_TOKEN")), json.NewEncoder(os.Stderr)}
	gin.SetMode(gin.ReleaseMode)
	router := gin.New()
	router.Use(gin.Recovery())
	router.POST("/admin/jobs/:id/emergency-stop", s.stopJob)
	log.Fatal(router.Run("127.0.0.1:" + os.Getenv("PORT")))
}
