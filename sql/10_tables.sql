-- The tables jobs and executions: refuses what cannot work, then makes and adds what is missing, under one lock.
-- Loaded again, over a running system, at any time: where nothing is missing, nothing is locked.
--
-- Raises   wrong_object_type (42809)         jobs or executions is not an ordinary table
--          undefined_column (42703)          an existing table lacks a column that cannot be made up
--          datatype_mismatch (42804)         a column of an existing table has a type that cannot work
--          collation_mismatch (42P21)        the collation of an id cannot work
--          invalid_table_definition (42P16)  jobs.id is not unique
--          lock_not_available (55P03)        others use the tables; nothing was changed

-- Existing tables: each column that is used.
DO $$
DECLARE
    v_text CONSTANT regtype[] := '{text,varchar}';
    v_time CONSTANT regtype[] := '{timestamptz,timestamp}';
    v_id   CONSTANT regtype[] := '{text,varchar,uuid,bigint,int}';
    v_need record;
    v_kind "char";
    v_is   record;
BEGIN
    FOR v_need IN
        SELECT n.*
        FROM (VALUES
            ('jobs',       'id',           v_id,                 1, false),
            ('jobs',       'status',       v_text,               7, false),
            ('jobs',       'metadata',     '{jsonb}'::regtype[], 0, true),
            ('jobs',       'created_at',   v_time,               0, true),
            ('jobs',       'updated_at',   v_time,               0, true),
            ('executions', 'id',           v_id || 'smallint'::regtype, 1, false),
            ('executions', 'job_id',       v_id || 'smallint'::regtype, 1, false),
            ('executions', 'status',       v_text,               7, false),
            ('executions', 'output',       '{jsonb}'::regtype[], 0, true),
            ('executions', 'created_at',   v_time,               0, true),
            ('executions', 'started_at',   v_time,               0, true),
            ('executions', 'completed_at', v_time,               0, true)
        ) AS n (table_name, column_name, types, min_length, can_be_added)
        WHERE to_regclass(n.table_name) IS NOT NULL
    LOOP
        -- Rows that move between partitions, or are written to a child, pass by the triggers of the guard.
        SELECT c.relkind INTO v_kind FROM pg_class c WHERE c.oid = to_regclass(v_need.table_name);
        IF v_kind <> 'r' OR EXISTS (SELECT FROM pg_inherits i WHERE to_regclass(v_need.table_name) IN (i.inhrelid, i.inhparent)) THEN
            RAISE wrong_object_type
                USING MESSAGE = format('%s is not an ordinary table: expected one without partitions or children', v_need.table_name);
        END IF;

        -- varchar(n) has n + 4 as its modifier.
        SELECT a.atttypid::regtype AS type, a.atttypmod - 4 AS size, a.attgenerated <> '' AS is_generated,
               COALESCE(NOT c.collisdeterministic, false) AS is_ambiguous, c.collname
        INTO v_is
        FROM pg_attribute a
        LEFT JOIN pg_collation c ON c.oid = a.attcollation
        WHERE a.attrelid = to_regclass(v_need.table_name) AND a.attname = v_need.column_name AND NOT a.attisdropped;
        IF NOT FOUND THEN
            CONTINUE WHEN v_need.can_be_added;
            RAISE undefined_column
                USING MESSAGE = format('column %s.%s is missing: expected %s',
                                       v_need.table_name, v_need.column_name, array_to_string(v_need.types, ' or '));
        ELSIF v_is.is_generated THEN
            RAISE datatype_mismatch
                USING MESSAGE = format('column %s.%s is generated: expected one that can be set', v_need.table_name, v_need.column_name);
        ELSIF v_is.type <> ALL (v_need.types) THEN
            RAISE datatype_mismatch
                USING MESSAGE = format('column %s.%s has type %s: expected %s',
                                       v_need.table_name, v_need.column_name, v_is.type, array_to_string(v_need.types, ' or '));
        ELSIF v_is.size BETWEEN 1 AND v_need.min_length - 1 AND v_is.type = 'varchar'::regtype THEN
            RAISE datatype_mismatch
                USING MESSAGE = format('column %s.%s is varchar(%s): expected room for at least %s characters',
                                       v_need.table_name, v_need.column_name, v_is.size, v_need.min_length);
        ELSIF v_is.is_ambiguous AND v_need.column_name <> 'status' THEN
            RAISE collation_mismatch
                USING MESSAGE = format('column %s.%s has the nondeterministic collation %I: expected one in which only the same '
                                       'text is equal', v_need.table_name, v_need.column_name, v_is.collname);
        END IF;
    END LOOP;
END;
$$;

-- Existing tables: what belongs together.
DO $$
DECLARE
    v_job_id       record;
    v_execution_id record;
BEGIN
    IF to_regclass('jobs') IS NOT NULL AND NOT EXISTS (
        SELECT
        FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = to_regclass('jobs') AND i.indisunique AND i.indisvalid
          AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'
    ) THEN
        RAISE invalid_table_definition
            USING MESSAGE = 'column jobs.id is not unique: expected a primary key or a unique index on it alone';
    END IF;

    -- A new table of jobs has ids of type text. Types of one category compare: texts, integers, uuid.
    SELECT COALESCE(j.atttypid, 'text'::regtype)::regtype AS type, COALESCE(c.collname, 'default') AS collation,
           COALESCE(t.typcategory, 'S') AS category
    INTO v_job_id
    FROM (SELECT) AS one
    LEFT JOIN pg_attribute j ON j.attrelid = to_regclass('jobs') AND j.attname = 'id'
    LEFT JOIN pg_type t ON t.oid = j.atttypid
    LEFT JOIN pg_collation c ON c.oid = j.attcollation;

    SELECT e.atttypid::regtype AS type, COALESCE(c.collname, 'default') AS collation, t.typcategory AS category
    INTO v_execution_id
    FROM pg_attribute e
    JOIN pg_type t ON t.oid = e.atttypid
    LEFT JOIN pg_collation c ON c.oid = e.attcollation
    WHERE e.attrelid = to_regclass('executions') AND e.attname = 'job_id';
    IF v_execution_id.category <> v_job_id.category THEN
        RAISE datatype_mismatch
            USING MESSAGE = format('column executions.job_id has type %s: expected one that compares with jobs.id, which has type %s',
                                   v_execution_id.type, v_job_id.type);
    ELSIF v_execution_id.collation <> v_job_id.collation THEN
        RAISE collation_mismatch
            USING MESSAGE = format('column executions.job_id has the collation %I: expected that of jobs.id, %I',
                                   v_execution_id.collation, v_job_id.collation);
    END IF;
END;
$$;

DO $$
BEGIN
    IF EXISTS (SELECT FROM installation_steps()) THEN
        PERFORM lock_all_tables();
    END IF;
END;
$$;

-- What is not there at all.
DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY '{jobs,executions}'::text[] LOOP
        RAISE NOTICE USING MESSAGE = format('table %s: %s', v_table, CASE WHEN to_regclass(v_table) IS NULL THEN 'made' ELSE 'found' END);
    END LOOP;
    IF to_regclass('jobs') IS NULL THEN
        CREATE TABLE jobs (
            id         text PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 255),
            status     text NOT NULL DEFAULT 'created',
            metadata   jsonb,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;
    IF to_regclass('executions') IS NULL THEN
        CREATE TABLE executions (
            id           bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY WITH (fillfactor = 60),
            job_id       text NOT NULL,
            status       text NOT NULL DEFAULT 'pending',
            output       jsonb,
            created_at   timestamptz NOT NULL DEFAULT now(),
            started_at   timestamptz,
            completed_at timestamptz
        );
        EXECUTE (
            SELECT format('ALTER TABLE executions ALTER COLUMN job_id TYPE %s %s USING NULL, ADD FOREIGN KEY (job_id) REFERENCES jobs (id)',
                          format_type(a.atttypid, a.atttypmod), 'COLLATE ' || NULLIF(a.attcollation, 0)::regcollation)
            FROM pg_attribute a
            WHERE a.attrelid = to_regclass('jobs') AND a.attname = 'id');
    END IF;
END;
$$;
